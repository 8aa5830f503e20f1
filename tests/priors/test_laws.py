"""What every registered prior must do: a new family is tested on arrival."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gradleak import priors
from gradleak.errors import CorruptFile, InvalidInput, NotApplicable
from gradleak.priors import PRIORS, Denoiser, Fitted, Generator
from gradleak.types import Batch, DataSpec
from tests.laws.small import SMALL_PRIORS, SPEC, stream

PROPER = [name for name, family in PRIORS.items() if family.proper]
SCORED = [name for name, family in PRIORS.items() if family.fitted not in (Generator, Denoiser)]
"""All but generators and denoisers, which draw pictures and have no density."""
PAIR = DataSpec("tabular", (2,), (0.0, 1.0), 2)
ALPHA = 1e-6
"""P(false failure) of a statistical assertion, over everything that it compares."""


def examples(data: DataSpec, count: int, *, seed: int = 0) -> Batch:
    """Correlated examples about a mean that depends on the class."""
    draw = stream(seed)
    d = math.prod(data.shape)
    labels = torch.arange(count) % data.classes
    blend = torch.randn((d, d), generator=draw, dtype=torch.float64) / d**0.5
    centres = torch.rand((data.classes, d), generator=draw, dtype=torch.float64)
    noise = torch.randn((count, d), generator=draw, dtype=torch.float64) @ blend
    return Batch((centres[labels] + 0.2 * noise).reshape(count, *data.shape), labels)


@cache
def fitted(name: str, data: DataSpec = SPEC) -> Fitted:
    return fit(name, examples(data, 90), data)


def fit(name: str, public: Batch, data: DataSpec = SPEC) -> Fitted:
    return priors.fit(SMALL_PRIORS.get(name, name), public, data, seed=0)


def inputs_of(data: DataSpec, trials: int, b: int, *, seed: int = 5) -> Tensor:
    return examples(data, trials * b, seed=seed).inputs.unflatten(0, (trials, b))


def labellings(trials: int, b: int, classes: int) -> dict[str, Tensor | None]:
    draw = stream(3)
    hard = torch.randint(classes, (trials, b), generator=draw)
    soft = torch.rand((trials, b, classes), generator=draw, dtype=torch.float64).softmax(-1)
    return {"hard": hard, "soft": soft, "unknown": None}


@pytest.mark.parametrize("name", PRIORS)
def test_a_family_says_what_it_is(name: str) -> None:
    prior = fitted(name)
    assert (prior.id, prior.proper) == (name, PRIORS[name].proper)
    assert prior.title
    assert type(prior) is PRIORS[name].fitted


@pytest.mark.parametrize("kind", ["hard", "soft", "unknown"])
@pytest.mark.parametrize("name", SCORED)
def test_trials_and_examples_are_independent(name: str, kind: str) -> None:
    prior, x = fitted(name), inputs_of(SPEC, 3, 2)
    labels = labellings(3, 2, SPEC.classes)[kind]
    together = prior.log_prob(x, labels)
    assert together.shape == (3,)
    alone = torch.zeros(3, dtype=torch.float64)
    for t in range(3):
        for i in range(2):
            label = None if labels is None else labels[t, i][None, None]
            alone[t] += prior.log_prob(x[t, i][None, None], label)[0]
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-9)
    over = torch.func.vmap(
        (lambda a: prior.log_prob(a[None])[0])
        if labels is None
        else (lambda a, y: prior.log_prob(a[None], y[None])[0])
    )
    assert torch.allclose(over(x) if labels is None else over(x, labels), together, rtol=1e-12)


@pytest.mark.parametrize("kind", ["hard", "soft", "unknown"])
@pytest.mark.parametrize("name", SCORED)
def test_gradients_are_finite_differences(name: str, kind: str) -> None:
    labels = labellings(2, 2, SPEC.classes)[kind]
    x = inputs_of(SPEC, 2, 2).requires_grad_()
    prior = fitted(name)
    assert torch.autograd.gradcheck(lambda a: prior.log_prob(a, labels), (x,), atol=1e-4)
    if kind == "soft":
        soft = labels.clone().requires_grad_()  # type: ignore[union-attr]
        slope = torch.autograd.grad(prior.log_prob(x, soft).sum(), soft, allow_unused=True)[0]
        assert slope is None or bool(slope.isfinite().all())


@pytest.mark.parametrize("name", SCORED)
def test_soft_labels_of_one_class_are_that_class_and_give_finite_gradients(name: str) -> None:
    hard = labellings(3, 2, SPEC.classes)["hard"]
    soft = torch.nn.functional.one_hot(hard, SPEC.classes).double().requires_grad_()  # type: ignore[arg-type]
    x = inputs_of(SPEC, 3, 2).requires_grad_()
    values = fitted(name).log_prob(x, soft)
    assert torch.allclose(values, fitted(name).log_prob(x, hard), rtol=1e-12)
    slopes = torch.autograd.grad(values.sum(), (x, soft), allow_unused=True)
    assert all(slope is None or bool(slope.isfinite().all()) for slope in slopes)


@pytest.mark.parametrize("name", SCORED)
def test_unknown_labels_average_the_densities_of_the_classes(name: str) -> None:
    prior, x = fitted(name), inputs_of(SPEC, 5, 1)
    each = [prior.log_prob(x, torch.full((5, 1), c)) for c in range(SPEC.classes)]
    average = torch.stack(each).logsumexp(0) - math.log(SPEC.classes)  # equal public shares
    assert torch.allclose(prior.log_prob(x), average, rtol=1e-10)


@pytest.mark.parametrize("name", SCORED)
def test_single_precision_agrees(name: str) -> None:
    prior, x = fitted(name), inputs_of(SPEC, 8, 3)
    labels = labellings(8, 3, SPEC.classes)["hard"]
    exact = prior.log_prob(x, labels)
    for other in (prior, prior.to(torch.float32)):
        single = other.log_prob(x.float(), labels)
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), exact, rtol=1e-4, atol=1e-2)


POINTS = 801


def integral(
    density: Callable[[Tensor], Tensor], *, reach: float = 4, points: int = POINTS
) -> float:
    """∬ over (−reach, 1 + reach)² by the trapezoidal rule."""
    line = torch.linspace(-reach, 1 + reach, points, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)[:, None]
    return float(density(grid).exp().sum()) * float(line[1] - line[0]) ** 2


@pytest.mark.parametrize("name", PROPER)
def test_a_density_integrates_to_one(name: str) -> None:
    prior = fitted(name, PAIR)
    for labels in (None, torch.ones(POINTS**2, 1, dtype=torch.int64)):
        assert integral(lambda x, y=labels: prior.log_prob(x, y)) == pytest.approx(1, abs=1e-3)  # type: ignore[misc]


def deviation(prior: Fitted, labels: Tensor | int, *, fault: float = 0) -> float:
    """Largest |sample mean − mean| over the entries, in standard errors.

    `fault` moves the samples by that many standard deviations.
    """
    drawn = prior.sample(labels, generator=stream(1)).flatten(1)
    gap = drawn.mean(0) + fault * drawn.std(0) - prior.mean(labels).flatten(1).mean(0)
    return float((gap / (drawn.std(0) / len(drawn) ** 0.5)).abs().max())


@pytest.mark.parametrize("name", PROPER)
def test_the_mean_is_the_expectation_of_samples(name: str) -> None:
    """n = 20 000, 16 entries, three labellings: Bonferroni at ALPHA, normal in the limit."""
    n, prior = 20_000, fitted(name)
    limit = -torch.special.ndtri(torch.tensor(ALPHA / 16 / 3 / 2, dtype=torch.float64)).item()
    soft = torch.tensor([[0.5, 0.2, 0.3]], dtype=torch.float64).expand(n, -1)
    for labels in (n, torch.full((n,), 2), soft):
        assert deviation(prior, labels) < limit
    assert deviation(prior, n, fault=0.1) > limit


@pytest.mark.parametrize("name", PROPER)
def test_samples_follow_the_density(name: str) -> None:
    """E[log q(x)] under p falls short of E[log p(x)] by KL(p, q) for every other density q.

    q is p moved by 0.05 along one entry, at n = 20 000. The differences of the two logarithms are
    tested to have a positive mean, and the importance weights q/p to have mean one: at ALPHA each.
    """
    prior, n = fitted(name, PAIR), 20_000
    x = prior.sample(n, generator=stream(2))[:, None]
    move = torch.tensor([0.05, 0.0], dtype=torch.float64)
    ratio = prior.log_prob(x - move) - prior.log_prob(x)
    weight = ratio.exp()
    limit = -torch.special.ndtri(torch.tensor(ALPHA / 2, dtype=torch.float64)).item()

    def errors(values: Tensor, centre: float) -> float:
        return float((values.mean() - centre) / (values.std() / n**0.5))

    assert abs(errors(weight, 1)) < limit
    assert errors(ratio, 0) < -limit  # and so would a sampler of q be found out
    planted = prior.log_prob(x - move) - prior.log_prob(x) - 0.1  # a constant that is wrong
    assert abs(errors(planted.exp(), 1)) > limit


@pytest.mark.parametrize("name", PRIORS)
def test_equal_generators_give_equal_samples(name: str) -> None:
    prior = fitted(name)
    if not prior.proper and name in SCORED:
        with pytest.raises(InvalidInput, match="improper"):
            prior.sample(3, generator=stream(0))
        return
    first, again, other = (prior.sample(3, generator=stream(seed)) for seed in (0, 0, 1))
    assert first.shape == (3, *SPEC.shape)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", PRIORS)
def test_fits_are_deterministic_and_files_bring_them_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    prior = fitted(name)
    priors.save(prior, path)
    back = priors.load(path)
    assert (back.family, back.data) == (prior.family, prior.data)
    assert priors.digest(back) == priors.digest(prior)
    assert priors.digest(fit(name, examples(SPEC, 90))) == priors.digest(prior)
    if name in SCORED:
        x = inputs_of(SPEC, 4, 2)
        assert torch.equal(back.log_prob(x), prior.log_prob(x))
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        b"\x80\x04pickle",
        whole.replace(b"family", b"famili"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(CorruptFile, match="not a whole file of a prior") as error:
            priors.load(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRIORS)
def test_odd_public_examples_fit_too(name: str) -> None:
    """One example, equal examples, and a class without any, as a small audit may have them."""
    lone = Batch(torch.rand(1, 1, 4, 4), torch.tensor([1]))
    equal = Batch(torch.full((5, 1, 4, 4), 0.5), torch.tensor([0, 0, 1, 1, 1]))
    lacking = Batch(torch.rand(40, 1, 4, 4), torch.arange(40) % 2)
    for public in (lone, equal, lacking):
        if (name, len(public)) == ("mixture", 1):
            with pytest.raises(InvalidInput, match="expected at least 2"):
                fit(name, public)
            continue
        prior = fit("tv:weight=1" if name == "tv" else name, public)
        x = inputs_of(SPEC, 2, 1)
        for labels in (None, torch.full((2, 1), 2)) if name in SCORED else ():
            assert bool(prior.log_prob(x, labels).isfinite().all())
        assert bool(prior.mean(torch.tensor([2])).isfinite().all())


@pytest.mark.parametrize("name", PRIORS)
def test_refusals(name: str) -> None:
    prior = fitted(name)
    refused: type[Exception] = InvalidInput if name in SCORED else NotApplicable
    told = r"expected floating-point \(trials, b, 1, 4, 4\)" if name in SCORED else "no density"
    for wrong in (torch.rand(2, 3, 1, 4, 5), torch.zeros(2, 3, 1, 4, 4, dtype=torch.int64)):
        with pytest.raises(refused, match=told):
            prior.log_prob(wrong)
    for public in (
        Batch(torch.rand(3, 1, 4, 5), torch.zeros(3, dtype=torch.int64)),
        Batch(torch.rand(3, 1, 4, 4) * torch.nan, torch.zeros(3, dtype=torch.int64)),
        Batch(torch.rand(3, 1, 4, 4), torch.full((3,), 7)),
    ):
        with pytest.raises(InvalidInput, match="public"):
            fit(name, public)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot read the prior"):
        priors.load(tmp_path / "nothing")
    with pytest.raises(InvalidInput, match="cannot write the prior"):
        priors.save(fitted("box"), tmp_path / "nowhere" / "prior")


def test_numbers_that_do_not_fit_are_refused() -> None:
    prior = fitted("gaussian")
    for broken in (torch.zeros(2, 16), torch.full((3, 16), np.nan)):
        with pytest.raises(InvalidInput, match=r"means|given_class"):
            dataclasses.replace(prior, means=broken)  # type: ignore[call-arg]
