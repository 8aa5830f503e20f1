"""Laws of every mechanism under every protection; a new file in either package is tested here."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product

import pytest
import torch
from scipy import stats
from torch import Tensor

from gradleak.defenses import (
    ATS,
    DEFENSES,
    Defense,
    GaussianNoise,
    LabelSmoothing,
    LaplaceNoise,
    MixUp,
    RandomMask,
    Soteria,
    TopK,
    Wrapped,
    build,
    mixes_labels,
    rebased,
    undefended,
)
from gradleak.defenses.encoded import Encoded
from gradleak.errors import IntractableLikelihood, NotApplicable
from gradleak.mechanisms import (
    MECHANISMS,
    Denoising,
    DenoisingAvg,
    Diffusing,
    FedAvg,
    FedSGD,
    Vertical,
)
from gradleak.types import Batch, Mechanism, ModelState, Update
from tests.laws.elsewhere import ELSEWHERE, Elsewhere
from tests.laws.small import (
    OneWeight,
    OneWeightDenoiser,
    batch_of,
    network_for,
    state_of,
    stream,
)

CORES: dict[str, Mechanism] = {name: kind() for name, kind in MECHANISMS.items()} | {
    "fedavg-3-steps": FedAvg(steps=3, learning_rate=0.1),
    "fedavg-shuffled": FedAvg(minibatch_size=1, order="shuffled", learning_rate=0.5),
    "vertical": Vertical(rounds=2, round_size=1),
}
FOR_CLASSIFIERS = ("label-smoothing", "precode", "soteria")
"""Protections that refuse a client of a diffusion model."""
SUBJECTS = {
    f"{defense}({core})": DEFENSES[defense]()(CORES[core])
    for defense, core in product(DEFENSES, CORES)
    if not (defense in FOR_CLASSIFIERS and isinstance(CORES[core], Diffusing))
}
ALPHA = 1e-6
"""Probability that a correct mechanism fails one statistical law, over all its coordinates."""


@pytest.fixture
def state(request: pytest.FixtureRequest) -> ModelState:
    names = request.fixturenames
    subject = request.getfixturevalue("mechanism") if "mechanism" in names else FedSGD()
    return state_of(network_for(subject))


@pytest.fixture(params=SUBJECTS, scope="module")
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    return SUBJECTS[request.param]


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


def test_update_has_the_names_shapes_and_kind_of_the_parameters(
    mechanism: Mechanism, state: ModelState
) -> None:
    update = mechanism.sample(state, batch_of(2), generator=stream(0))
    assert update.kind == mechanism.kind
    assert {k: v.shape for k, v in update.values.items()} == {
        k: v.shape for k, v in state.params.items()
    }


def test_equal_generators_give_equal_samples(mechanism: Mechanism, state: ModelState) -> None:
    batch = batch_of(3)
    first, again, other = (
        flat(mechanism.sample(state, batch, generator=stream(seed))) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert torch.equal(first, other) == mechanism.deterministic


@pytest.mark.parametrize("defense", DEFENSES)
def test_every_protection_has_a_data_sheet(defense: str) -> None:
    sheet = DEFENSES[defense].sheet
    assert all((sheet.paper, sheet.promises, sheet.broken_by, sheet.cost))
    assert not sheet.link or sheet.link.startswith("https://")


@pytest.mark.parametrize("defense", FOR_CLASSIFIERS)
@pytest.mark.parametrize("core", [Denoising(), GaussianNoise()(DenoisingAvg())])
def test_a_protection_of_classifiers_refuses_a_denoiser(defense: str, core: Mechanism) -> None:
    with pytest.raises(NotApplicable, match=f"{defense}: expected a classifier"):
        DEFENSES[defense]()(core)


@dataclass(frozen=True)
class Noting(FedSGD):
    """A client that notes what it is asked to train on."""

    noted: list[Batch] = field(default_factory=list)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        self.noted.append(batch)
        return super().sample(state, batch, generator=generator)


@dataclass(frozen=True)
class NotingDenoiser(Denoising):
    """The same of a diffusion model."""

    noted: list[Batch] = field(default_factory=list)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        self.noted.append(batch)
        return super().sample(state, batch, generator=generator)


@pytest.mark.parametrize("defense", [d for d in DEFENSES if d not in FOR_CLASSIFIERS])
@pytest.mark.parametrize("transforms", [False, True])
def test_what_a_denoisers_client_trained_on_can_be_replayed(defense: str, transforms: bool) -> None:
    """No label is touched: none is used."""
    client = NotingDenoiser()
    mechanism = DEFENSES[defense]()(ATS("3-1-7/43-18-18")(client) if transforms else client)
    state, batch = state_of(network_for(mechanism)), batch_of(3)
    for seed in range(2):
        mechanism.sample(state, batch, generator=stream(seed))
        replayed = mechanism.trained_on(state, batch, generator=stream(seed))
        assert torch.equal(replayed.inputs, client.noted[-1].inputs)
        assert torch.equal(replayed.labels, batch.labels)
        encodes = isinstance(mechanism, Encoded)
        assert torch.equal(replayed.inputs, batch.inputs) != (transforms or encodes)


@pytest.mark.parametrize("defense", DEFENSES)
@pytest.mark.parametrize("transforms", [False, True])
def test_what_the_client_trained_on_can_be_replayed(defense: str, transforms: bool) -> None:
    """Alone, and around a protection that transforms inputs by draws of its own."""
    client = Noting()
    mechanism = DEFENSES[defense]()(ATS("3-1-7/43-18-18")(client) if transforms else client)
    state = state_of(network_for(mechanism))
    batch = batch_of(3)
    for seed in range(4):
        mechanism.sample(state, batch, generator=stream(seed))
        replayed = mechanism.trained_on(state, batch, generator=stream(seed))
        assert torch.equal(replayed.inputs, client.noted[-1].inputs)
        assert torch.equal(replayed.labels, client.noted[-1].labels)
        encodes = isinstance(mechanism, Encoded)
        assert torch.equal(replayed.inputs, batch.inputs) != (transforms or encodes)
        softens = mixes_labels(mechanism) or defense == LabelSmoothing.id
        assert (replayed.labels.ndim == 2) == softens
        if softens:
            torch.testing.assert_close(replayed.labels.sum(1), torch.ones(3, dtype=torch.float64))


def assert_mean(
    mechanism: Mechanism, state: ModelState, batch: Batch, *, draws: int, alpha: float = ALPHA
) -> None:
    """H0: `mean` is the expectation of `sample`; z-test along random directions, Bonferroni.

    Sums over coordinates are nearly normal even where one coordinate hardly ever changes.
    """
    mean = flat(mechanism.mean(state, batch))
    generator = stream(3)
    directions = torch.randn((mean.numel(), 64), generator=stream(4), dtype=torch.float64)
    samples = torch.stack(
        [flat(mechanism.sample(state, batch, generator=generator)) for _ in range(draws)]
    )
    error = (samples @ directions).std(0) / draws**0.5
    gap = ((samples.mean(0) - mean) @ directions).abs()
    limit = stats.norm.isf(alpha / 2 / directions.shape[1])
    assert bool((gap <= limit * error + 1e-12).all())


def test_mean_is_the_expectation_of_sample(mechanism: Mechanism, state: ModelState) -> None:
    batch = batch_of(2)
    try:
        mechanism.mean(state, batch)
    except IntractableLikelihood:
        assert not mechanism.deterministic
        return
    assert_mean(mechanism, state, batch, draws=2 if mechanism.deterministic else 200)


@dataclass(frozen=True)
class Biased(Wrapped):
    """A fault: the mean it declares forgets a third of its noise's standard deviation."""

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, batch)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        noisy = GaussianNoise(std=0.03)(self.inner).sample(state, batch, generator=generator)
        return Update({k: v + 0.01 for k, v in noisy.values.items()}, noisy.kind)


def test_a_biased_mean_is_found(state: ModelState) -> None:
    with pytest.raises(AssertionError):
        assert_mean(Biased(FedSGD(), GaussianNoise()), state, batch_of(2), draws=200)


def test_predict_at_the_true_batch_is_the_update_received(
    mechanism: Mechanism, state: ModelState
) -> None:
    batch = batch_of(3)
    received = mechanism.sample(state, batch, generator=stream(5))
    predicted = mechanism.predict(received, state, batch)
    if mechanism.deterministic:
        torch.testing.assert_close(flat(predicted), flat(received), rtol=1e-12, atol=1e-14)
    else:
        assert predicted.values.keys() == received.values.keys()


def test_predict_is_differentiable_in_inputs_and_soft_labels(
    mechanism: Mechanism, state: ModelState
) -> None:
    batch = batch_of(2)
    received = mechanism.sample(state, batch, generator=stream(5))
    weights = torch.randn(flat(received).shape, generator=stream(6), dtype=torch.float64)

    def scalar(inputs: Tensor, logits: Tensor) -> Tensor:
        claim = Batch(inputs, logits.softmax(1))
        return flat(mechanism.predict(received, state, claim)) @ weights

    logits = torch.zeros((2, 3), dtype=torch.float64, requires_grad=True)
    inputs = batch.inputs.clone().requires_grad_()
    gradients = torch.autograd.grad(scalar(inputs, logits), (inputs, logits), allow_unused=True)
    for gradient, leaf in zip(gradients, (inputs, logits), strict=True):
        if leaf is logits and isinstance(undefended(mechanism), Diffusing):
            assert gradient is None  # it uses no labels
            continue
        assert gradient is not None
        assert gradient.abs().sum() > 0
        direction = torch.randn(leaf.shape, generator=stream(7), dtype=torch.float64)
        step = 1e-6 * direction
        moved = [
            (inputs + s * step, logits) if leaf is inputs else (inputs, logits + s * step)
            for s in (1, -1)
        ]
        with torch.no_grad():
            numeric = (scalar(*moved[0]) - scalar(*moved[1])) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=2e-5, atol=1e-8)


def test_log_prob_integrates_to_one(mechanism: Mechanism) -> None:
    denoises = isinstance(undefended(mechanism), Diffusing)
    state, batch = state_of(OneWeightDenoiser if denoises else OneWeight), batch_of(1, classes=2)
    try:
        received = mechanism.sample(state, batch, generator=stream(0))
        mechanism.log_prob(received, state, batch)
    except (IntractableLikelihood, NotApplicable):
        return
    mean = flat(mechanism.mean(state, batch))
    # Fine at the centre and wide at the ends, for noise of 0.01 as for noise of 1.
    grid = 0.01 * torch.linspace(-7, 7, 601, dtype=torch.float64).sinh()
    density = [
        float(mechanism.log_prob(Update({"w": mean + u}, mechanism.kind), state, batch).exp())
        for u in grid
    ]
    assert float(torch.trapezoid(torch.tensor(density), grid)) == pytest.approx(1, abs=1e-3)


def test_score_has_mean_zero(mechanism: Mechanism, state: ModelState) -> None:
    """H0: E[∂ log p(u | x) / ∂x] = 0 under u ~ sample; n = 200, z-test, Bonferroni at ALPHA."""
    batch, generator, draws = batch_of(1), stream(8), 200
    scores = []
    for _ in range(draws):
        update = mechanism.sample(state, batch, generator=generator)
        inputs = batch.inputs.clone().requires_grad_()
        try:
            value = mechanism.log_prob(update, state, Batch(inputs, batch.labels))
        except IntractableLikelihood:
            return
        scores.append(torch.autograd.grad(value, inputs)[0].flatten())
    stacked = torch.stack(scores)
    z = stacked.mean(0) / (stacked.std(0) / draws**0.5)
    assert float(z.abs().max()) < stats.norm.isf(ALPHA / 2 / z.numel())


def assert_leaves_uncorrelated(mechanism: Mechanism, state: ModelState, *, draws: int) -> None:
    """H0: noise of equally shaped tensors is uncorrelated; z-test of the pooled products."""
    batch, generator = batch_of(1), stream(9)
    mean = mechanism.mean(state, batch).values
    products = []
    for _ in range(draws):
        values = mechanism.sample(state, batch, generator=generator).values
        first, second = (values[k] - mean[k] for k in ("twin.weight", "other_twin.weight"))
        products.append((first * second).sum())
    stacked = torch.stack(products)
    assert stacked.std() > 0
    assert abs(float(stacked.mean() / (stacked.std() / draws**0.5))) < stats.norm.isf(ALPHA / 2)


@pytest.mark.parametrize(
    "spec",
    [
        "gaussian-noise:std=0.1",
        "laplace-noise:std=0.1",
        "gaussian-noise:std=0.1,scope=example",
        "laplace-noise:std=0.1,scope=example",
        "random-mask",
        "quantize:levels=2",
        "round:rounding=stochastic,step=0.1",
        "random-mask+gaussian-noise:std=0.1",
        "dp-sgd",
        "dp-sgd:scope=example",
    ],
)
def test_noise_in_distinct_tensors_is_uncorrelated(spec: str, state: ModelState) -> None:
    assert_leaves_uncorrelated(build(spec)(FedSGD()), state, draws=400)


@dataclass(frozen=True)
class OneSeedForAll(Wrapped):
    """A fault seen in published code: every tensor gets the noise of the same generator state."""

    def mean(self, state: ModelState, batch: Batch) -> Update:
        return self.inner.mean(state, batch)

    def sample(self, state: ModelState, batch: Batch, *, generator: torch.Generator) -> Update:
        clean = self.inner.sample(state, batch, generator=generator)
        seed = int(torch.randint(2**31, (), generator=generator))
        noise = GaussianNoise(0.1)
        noisy = {k: v + noise.draw(v, stream(seed)) for k, v in clean.values.items()}
        return Update(noisy, clean.kind)


def test_shared_noise_is_found(state: ModelState) -> None:
    with pytest.raises(AssertionError):
        assert_leaves_uncorrelated(OneSeedForAll(FedSGD(), GaussianNoise()), state, draws=400)


@pytest.mark.parametrize("noise", [GaussianNoise(0.2), LaplaceNoise(0.2)], ids=lambda n: n.id)
def test_noise_has_the_standard_deviation_it_names(noise: GaussianNoise | LaplaceNoise) -> None:
    """n = 200 000 draws; the sample variance's relative error is √(κ−1)/√n; α = 1e-6."""
    draws = noise.draw(torch.zeros(200_000, dtype=torch.float64), stream(10))
    kurtosis = 3 if isinstance(noise, GaussianNoise) else 6
    tolerance = stats.norm.isf(ALPHA / 2) * ((kurtosis - 1) / draws.numel()) ** 0.5
    assert float(draws.var() / noise.std**2) == pytest.approx(1, abs=tolerance)
    reference = stats.norm(scale=0.2) if kurtosis == 3 else stats.laplace(scale=0.2 / 2**0.5)
    assert stats.kstest(draws[:20_000].numpy(), reference.cdf).pvalue > ALPHA


@pytest.mark.parametrize(
    "identity",
    [
        GaussianNoise(0.0),
        LaplaceNoise(0.0),
        TopK(1.0),
        RandomMask(0.0),
        Soteria(0.0),
        MixUp(images=1),
        LabelSmoothing(0.0),
    ],
)
def test_identity_parameters_change_nothing(identity: Defense) -> None:
    core = FedSGD()
    assert identity(core) is core


def test_peeling_reaches_the_core_and_rebasing_keeps_the_onion(mechanism: Mechanism) -> None:
    core = undefended(mechanism)
    assert not isinstance(core, Wrapped)
    changed = rebased(mechanism, batch_norm="train")
    assert undefended(changed) == replace(core, batch_norm="train")  # type: ignore[type-var]
    assert type(changed) is type(mechanism)
    assert undefended(mechanism) == core


def test_a_client_computes_where_its_network_is(mechanism: Mechanism, state: ModelState) -> None:
    """What it sends, and what it would send by the attacker's belief, on another device."""
    batch = batch_of(2)
    here = mechanism.sample(state, batch, generator=stream(0))
    with Elsewhere():
        there = Batch(batch.inputs.to(ELSEWHERE), batch.labels.to(ELSEWHERE))
        sent = mechanism.sample(state.to(ELSEWHERE), there, generator=stream(0))
        assert {v.device for v in sent.values.values()} == {ELSEWHERE}
        believed = mechanism.predict(sent, state.to(ELSEWHERE), there)
        assert {v.device for v in believed.values.values()} == {ELSEWHERE}
        assert torch.allclose(flat(sent).cpu(), flat(here))
