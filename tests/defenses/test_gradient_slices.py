"""Gradient slices against brute force: risks, slices, patterns, noise, density and filter."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import stats
from torch import Tensor

import gradleak as gl
from gradleak.attacks import build as build_attack
from gradleak.attacks.recipes.blind_mask import agreed
from gradleak.data import load, split
from gradleak.defenses import GradientSlices, advanced, build, informed, undefended
from gradleak.defenses.compensation import edges, filtered, padded_shape, published_shape
from gradleak.defenses.gradient_slices import Sliced
from gradleak.defenses.risk import all_ones_risk, cumulative, frobenius_risk, greedy, pushed
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models import build as build_model
from gradleak.threat import ThreatModel
from gradleak.types import Batch, Exchange, Fact, Mechanism, ModelState, Observation, Update
from tests.laws.small import OneWeight, TwoTwins, batch_of, state_of, stream

ALPHA = 1e-6


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


def jacobian(state: ModelState, batch: Batch) -> dict[str, Tensor]:
    """Of every tensor's gradient in the inputs, (coordinates, b · 16)."""

    def gradient(x: Tensor) -> dict[str, Tensor]:
        return dict(FedSGD().mean(state, Batch(x, batch.labels)).values)

    found = torch.func.jacrev(gradient)(batch.inputs)
    return {k: v.reshape(-1, batch.inputs.numel()) for k, v in found.items()}


def test_probes_of_signs_average_to_the_frobenius_norm() -> None:
    """The rows of a Hadamard matrix are orthogonal signs, and so give it exactly."""
    state, batch = state_of(TwoTwins), batch_of(1)
    totals = dict.fromkeys(state.params, 0.0)
    for row in scipy.linalg.hadamard(16):
        signs = torch.tensor(row, dtype=torch.float64).reshape(batch.inputs.shape)
        for k, v in pushed(state, batch, signs, client=FedSGD()).items():
            totals[k] += float(v.square().sum()) / 16
    for k, j in jacobian(state, batch).items():
        assert totals[k] == pytest.approx(float(j.square().sum()), rel=1e-10)


def test_the_risk_is_the_root_mean_square_of_what_its_probes_find() -> None:
    state, batch = state_of(TwoTwins), batch_of(3)
    found = frobenius_risk(state, batch, client=FedSGD(), probes=4)
    draws = np.random.default_rng(0)
    signs = torch.from_numpy(
        np.stack([2.0 * draws.integers(0, 2, batch.inputs.shape) - 1 for _ in range(4)])
    ).reshape(4, -1)
    for k, j in jacobian(state, batch).items():
        exact = 3 * (signs @ j.T).square().sum(1).mean()
        assert found[k] ** 2 == pytest.approx(float(exact), rel=1e-10)


def test_the_published_probe_sees_no_risk_in_the_last_layer() -> None:
    state, batch = state_of(TwoTwins), batch_of(3)
    found = all_ones_risk(state, batch, client=FedSGD())
    slopes = jacobian(state, batch)
    for k, j in slopes.items():
        per_example = j.sum(0).reshape(3, -1).norm(dim=1).mean()
        assert found[k] == pytest.approx(float(per_example), abs=1e-15)
    assert found["head.weight"] < 1e-15
    assert found["head.bias"] < 1e-15
    assert float(slopes["head.weight"].norm()) > 1e-3


def test_slices_of_equal_risk_are_a_partition() -> None:
    sizes, risks = [300, 12, 3600, 10], [1.0, 0.3, 2.0, 0.7]
    slices = cumulative(sizes, risks, 10)
    assert torch.equal(torch.cat(slices), torch.arange(sum(sizes)))
    weight = torch.repeat_interleave(
        torch.tensor([r / n for r, n in zip(risks, sizes, strict=True)]), torch.tensor(sizes)
    )
    shares = torch.stack([weight[i].sum() for i in slices]) / weight.sum()
    largest = float(weight.max() / weight.sum())
    assert (shares - 0.1).abs().max() <= largest + 1e-6


def test_published_slices_overlap_and_the_tail_takes_what_is_left() -> None:
    """Atoms of 2, by hand: four of risk 1, then three of none; mean 4/3 over three slices.

    The first slice stops before its second atom, at 2 · 1 − 1; the second before the third.
    """
    found = [i.tolist() for i in greedy([8, 6], [4.0, 0.0], 3)]
    assert found == [[0, 1], [1, 2, 3], list(range(3, 14))]


def test_published_slicing_fails_on_an_atom_of_much_risk() -> None:
    """The first atom alone exceeds the mean: boundaries fall on −1, Python's last element."""
    found = [i.tolist() for i in greedy([2, 4], [5.0, 1.0], 4)]
    assert found == [[], [5], [5], [5, 0, 1, 2, 3, 4, 5]]


def told(rule: GradientSlices, mechanism: Mechanism | None = None) -> Sliced:
    found = informed(rule(mechanism or FedSGD()), batch_of(40, seed=9))
    assert isinstance(found, Sliced)
    return found


def test_the_root_set_is_the_first_five_of_every_class_in_order() -> None:
    public = batch_of(60, seed=3)
    known = GradientSlices().informed(public).public
    assert known is not None
    picked = [i for i in range(60) if int((public.labels[:i] == public.labels[i]).sum()) < 5]
    assert torch.equal(known.inputs, public.inputs[picked])


@pytest.mark.parametrize("mode", ["as-published", "corrected"])
@pytest.mark.parametrize("by", ["risk", "layer"])
def test_noise_falls_on_the_chosen_slices_alone(mode: str, by: str) -> None:
    """n = 100 updates: every pattern of 2 slices equally likely (χ², α = 1e-6), std as named."""
    client = told(GradientSlices(slices=5, chosen=2, std=0.3, mode=mode, by=by))  # type: ignore[arg-type]
    state, batch = state_of(TwoTwins), batch_of(2)
    clean = flat(FedSGD().mean(state, batch))
    slices, counts, draws = client.slices(state), {}, []
    for seed in range(100):
        gap = flat(client.sample(state, batch, generator=stream(seed))) - clean
        noisy = [j for j, i in enumerate(slices) if len(i) and bool((gap[i] != 0).all())]
        covered = torch.zeros(len(gap), dtype=torch.bool)
        for j in noisy:
            covered[slices[j]] = True
        assert bool((gap[~covered] == 0).all())
        assert len(noisy) == 2
        counts[tuple(noisy)] = counts.get(tuple(noisy), 0) + 1
        alone = torch.cat([slices[j] for j in noisy]).unique(return_counts=True)
        draws.append(gap[alone[0][alone[1] == 1]])
    patterns = math.comb(len(slices), 2)
    expected = [counts.get(p, 0) for p in itertools.combinations(range(len(slices)), 2)]
    assert len(expected) == patterns
    assert stats.chisquare(expected).pvalue > ALPHA
    noise = torch.cat(draws)
    assert float(noise.std()) == pytest.approx(0.3, rel=5 / math.sqrt(2 * len(noise)))


def test_precision_on_the_way_does_not_move_a_slice() -> None:
    client, state = told(GradientSlices()), state_of(TwoTwins).to(torch.float32)
    for one, other in zip(
        client.slices(state), client.slices(state.to(torch.float64)), strict=True
    ):
        assert torch.equal(one, other)


def test_a_known_seed_is_pythons_reservoir() -> None:
    rule = GradientSlices(seed=0)
    stream_0 = random.Random(0)
    rounds = []
    for _ in range(3):
        sample: list[int] = []
        for count, item in enumerate(range(10), 1):
            if len(sample) < 5:
                sample.append(item)
            elif (place := stream_0.randint(1, count)) <= 5:
                sample[place - 1] = item
        rounds.append(sample)
    assert [rule.known(10, earlier=t) for t in range(3)] == rounds
    state, batch, memory = state_of(TwoTwins), batch_of(1), {}
    client, clean = told(rule), flat(FedSGD().mean(state, batch))
    for sample in rounds:
        update, memory = advanced(client, state, batch, memory, generator=stream(0))
        gap = flat(update) - clean
        noisy = [j for j, i in enumerate(client.slices(state)) if bool((gap[i] != 0).all())]
        assert noisy == sorted(sample)


def test_a_client_keeps_its_slices_until_they_are_due() -> None:
    client = told(GradientSlices(refresh=2, std=1.0))
    states = [state_of(TwoTwins, seed=s) for s in range(3)]
    cuts = [client.slices(s) for s in states]
    assert any(not torch.equal(a, b) for a, b in zip(cuts[0], cuts[1], strict=True))
    batch, memory, used = batch_of(1), {}, []
    first = client.sample(states[0], batch, generator=stream(0))
    for t, state in enumerate(states):
        update, memory = advanced(client, state, batch, memory, generator=stream(t))
        gap = flat(update) - flat(FedSGD().mean(state, batch))
        if t == 0:
            assert torch.equal(flat(update), flat(first))
        used.append(
            next(
                n
                for n, cut in enumerate(cuts)
                if n in (t, 0) and all(bool((gap[i] != 0).all() | (gap[i] == 0).all()) for i in cut)
            )
        )
    assert used == [0, 0, 2]


def test_clipping_bounds_the_chosen_slices_of_every_example() -> None:
    """Noise of 1e-12 leaves the clipped mean in sight."""
    state, batch = state_of(TwoTwins), batch_of(3)
    client = told(GradientSlices(std=1e-12, clip=0.01))
    sent = flat(client.sample(state, batch, generator=stream(0)))
    each = torch.stack(
        [
            flat(FedSGD().mean(state, Batch(batch.inputs[i : i + 1], batch.labels[i : i + 1])))
            for i in range(3)
        ]
    )
    changed = 0
    for index in client.slices(state):
        lengths = each[:, index].norm(dim=1, keepdim=True)
        clipped = (each[:, index] * (0.01 / lengths).clamp(max=1)).mean(0)
        options = [float((sent[index] - v).abs().max()) for v in (clipped, each[:, index].mean(0))]
        assert min(options) < 1e-10
        changed += options[0] < 1e-10 < options[1]
    assert changed >= 3
    with pytest.raises(InvalidInput, match="expected it first"):
        GradientSlices(clip=0.1)(FedAvg())


@pytest.mark.parametrize("spec", ["gradient-slices:chosen=0", "gradient-slices:chosen=11",
                                  "gradient-slices:std=0", "gradient-slices:clip=-1"])  # fmt: skip
def test_what_makes_no_sense_is_refused(spec: str) -> None:
    with pytest.raises(InvalidInput):
        build(spec)


@dataclass(frozen=True)
class Everywhere(GradientSlices):
    """A fault: noise on every slice."""

    def pattern(self, count: int, generator: torch.Generator, *, earlier: int = 0) -> list[int]:
        return list(range(count))


def test_what_it_claims_is_checked() -> None:
    state, batch = state_of(TwoTwins), batch_of(1)
    before = FedSGD().mean(state, batch)
    honest = told(GradientSlices(std=0.1))
    after = honest.sample(state, batch, generator=stream(0))
    assert honest.rule.doubt(before, after) is None
    louder = GradientSlices(std=0.3)(FedSGD()).sample(state, batch, generator=stream(0))
    assert "adds" in honest.rule.doubt(before, louder)[0]  # type: ignore[index]
    everywhere = Everywhere(std=0.1)(FedSGD()).sample(state, batch, generator=stream(0))
    assert "spare" in honest.rule.doubt(before, everywhere)[0]  # type: ignore[index]


COVERED = [
    "gradient-slices:slices=6,chosen=3,std=0.05+gaussian-noise:std=0.02",
    "gaussian-noise:std=0.02+gradient-slices:slices=6,chosen=3,std=0.05",
    "gradient-slices:slices=6,chosen=3,std=0.05,mode=as-published+gaussian-noise:std=0.02",
    "gradient-slices:slices=6,chosen=3,std=0.05,seed=0+gaussian-noise:std=0.02",
]


def inner_layer(mechanism: Mechanism) -> Sliced:
    while not isinstance(mechanism, Sliced):
        mechanism = mechanism.inner  # type: ignore[attr-defined]
    return mechanism


@pytest.mark.parametrize("spec", COVERED)
def test_under_noise_the_density_is_the_mean_over_patterns(spec: str) -> None:
    state, batch = state_of(TwoTwins), batch_of(1)
    mechanism = informed(build(spec)(FedSGD()), batch_of(40, seed=9))
    update = mechanism.sample(state, batch, generator=stream(2))
    gap = flat(update) - flat(FedSGD().mean(state, batch))
    layer = inner_layer(mechanism)
    slices = layer.slices(state)
    subsets = list(itertools.combinations(range(6), 3))
    if layer.rule.seed is not None:
        subsets = [tuple(layer.rule.known(6))]
    terms = []
    for subset in subsets:
        variance = torch.full_like(gap, 0.02**2)
        for j in subset:
            variance[slices[j]] += 0.05**2
        terms.append(stats.norm.logpdf(gap.numpy(), scale=variance.sqrt().numpy()).sum())
    expected = np.logaddexp.reduce(terms) - math.log(len(subsets))
    assert float(mechanism.log_prob(update, state, batch)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("spec", COVERED)
def test_under_noise_the_density_integrates_to_one(spec: str) -> None:
    mechanism, state, batch = build(spec)(FedSGD()), state_of(OneWeight), batch_of(1, classes=2)
    mean = flat(mechanism.mean(state, batch))
    grid = torch.linspace(-0.6, 0.6, 241, dtype=torch.float64)
    density = [
        float(mechanism.log_prob(Update({"w": mean + u}, "gradient"), state, batch).exp())
        for u in grid
    ]
    assert float(torch.trapezoid(torch.tensor(density), grid)) == pytest.approx(1, abs=1e-3)


def test_several_claims_are_predicted_and_weighed_at_once() -> None:
    state, batch = state_of(TwoTwins), batch_of(1)
    mechanism = informed(build(COVERED[0])(FedSGD()), batch_of(40, seed=9))
    received = mechanism.sample(state, batch, generator=stream(0))

    def one(inputs: Tensor) -> dict[str, Tensor]:
        claim = Batch(inputs, batch.labels)
        found = dict(mechanism.predict(received, state, claim).values)
        return found | {"log_prob": mechanism.log_prob(received, state, claim)}

    claims = torch.stack([batch_of(1, seed=s).inputs for s in range(3)])
    together = torch.func.vmap(one)(claims)
    for i, claim in enumerate(claims):
        for k, v in one(claim).items():
            torch.testing.assert_close(together[k][i], v, rtol=1e-9, atol=1e-12)


def test_the_true_batch_is_predicted_but_for_the_noise_it_cannot_know() -> None:
    state, batch = state_of(TwoTwins), batch_of(2)
    client = told(GradientSlices(std=0.1))
    for seed in range(5):
        received = client.sample(state, batch, generator=stream(seed))
        assert torch.equal(flat(client.predict(received, state, batch)), flat(received))
        other = flat(client.predict(received, state, batch_of(2, seed=1)))
        same = other == flat(received)
        assert sum(bool(same[i].all()) for i in client.slices(state)) == 5


def reference_filter(values: np.ndarray, rows: int, columns: int, low: float, high: float,
                     *, below: bool) -> np.ndarray:  # fmt: skip
    matrix = values.reshape(rows, columns)
    centred = matrix - matrix.mean(0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=True)
    eigenvalues = np.zeros(columns)
    eigenvalues[: len(singular)] = singular**2 / (rows - 1)
    kept = (eigenvalues >= high) | (below & (eigenvalues <= low))
    return (matrix @ sum(np.outer(d, d) for d in directions[kept])).flatten()


@pytest.mark.parametrize("keep", ["outside", "above"])
def test_the_filter_is_that_of_a_dense_reference(keep: str) -> None:
    draws = np.random.default_rng(0)
    signal = np.outer(draws.normal(size=60), draws.normal(size=8)).flatten()
    values = signal + 0.3 * draws.normal(size=480)
    low, high = edges(0.09, 60 / 8)
    expected = reference_filter(values, 60, 8, low, high, below=keep == "outside")
    found = filtered(torch.from_numpy(values), variance=0.09, shape=(60, 8), keep=keep)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert 0 < np.linalg.norm(found.numpy()) < np.linalg.norm(values)


def test_the_two_shapes() -> None:
    assert published_shape(13426, 6.0) == (959, 14)
    assert published_shape(15826, 6.0) == (386, 41)
    assert padded_shape(13426, 6.0) == (286, 47)
    assert published_shape(97, 6.0) == (97, 1)


def test_the_published_variance_changes_nothing_under_much_noise() -> None:
    """10 clients; the bulk it expects lies 100 times too high, and everything below it is kept."""
    noise = torch.randn(15826, generator=stream(0), dtype=torch.float64) * math.sqrt(0.5 / 10)
    mean = {"w": noise}
    published = GradientSlices(std=1.0, mode="as-published").compensated(mean, clients=10)
    torch.testing.assert_close(published["w"], noise)
    corrected = GradientSlices(std=1.0).compensated(mean, clients=10)
    assert float(corrected["w"].norm()) < 0.5 * float(noise.norm())
    without = GradientSlices(std=1.0, compensate=False).compensated(mean, clients=10)
    assert torch.equal(without["w"], noise)


def test_the_right_variance_keeps_a_strong_direction() -> None:
    shape = padded_shape(15826, 6.0)
    column = torch.randn(shape[1], generator=stream(1), dtype=torch.float64)
    row = torch.randn(shape[0], generator=stream(2), dtype=torch.float64)
    signal = torch.outer(row, column).flatten()[:15826]
    noise = torch.randn(15826, generator=stream(0), dtype=torch.float64) * math.sqrt(0.05)
    found = GradientSlices(std=1.0).compensated({"w": signal + noise}, clients=10)["w"]
    assert float((found - signal).norm()) < 0.5 * float(noise.norm())


def digit(spec: str, *, model: str = "lenet-tiny", index: int = 1) -> tuple[Observation, Batch]:
    digits = load("digits")
    state = ModelState.of(build_model(model, digits.spec, seed=0)).to(torch.float64)
    public = digits.batch(split(digits, 0).public)
    mechanism = informed(build(spec)(FedSGD()), public)
    threat = ThreatModel(knows=frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, Fact.LABELS}))
    scenario = gl.Scenario(digits, state, mechanism, threat, indices=torch.tensor([index]))
    seen, truth = gl.simulate(scenario, generator=stream(0))
    return seen, truth.batch


def psnr(attack: str, seen: Observation, truth: Batch) -> float:
    claim = build_attack(attack)(seen, generator=stream(1))
    return float(gl.metrics.psnr_db(claim.batch, truth))


def test_an_attacker_who_knows_it_is_hardly_hindered() -> None:
    """One digit: a random guess scores about 8 dB."""
    seen, truth = digit("gradient-slices:std=0.2")
    dlg = "dlg:steps=60,restarts=2"
    assert psnr(dlg, replace(seen, mechanism=undefended(seen.mechanism)), truth) < 12
    assert psnr(dlg, seen, truth) > 60
    assert psnr("blind-mask:steps=60,restarts=2", seen, truth) > 60


def test_a_known_seed_gives_the_pattern_away() -> None:
    seen, truth = digit("gradient-slices:std=0.2,seed=0")
    assert psnr("blind-mask:steps=60,restarts=1,passes=1", seen, truth) > 50


def test_two_exchanges_that_agree_show_what_is_clean() -> None:
    seen, truth = digit("gradient-slices:std=0.2")
    layer = seen.mechanism
    assert isinstance(layer, Sliced)
    batch = Batch(truth.inputs.double(), truth.labels)
    updates = [layer.sample(seen.state, batch, generator=stream(s)) for s in range(5)]
    several = replace(seen, exchanges=tuple(Exchange(seen.state, u) for u in updates))
    merged, unsure = agreed(several, layer)
    assert unsure is not None
    assert len(unsure) < 5
    clean, found = flat(FedSGD().mean(seen.state, batch)), flat(merged.update)
    for j, index in enumerate(layer.slices(seen.state)):
        assert torch.equal(found[index], clean[index]) == (j not in unsure)
    assert agreed(seen, layer) == (seen, None)


def test_a_closed_form_finds_its_pattern() -> None:
    """A first linear layer under slices: unaware division fails, clean rows give the input."""
    seen, truth = digit("gradient-slices:std=0.2", model="mlp")
    unaware = psnr("linear-layer", seen, truth)
    assert unaware < 30
    assert psnr("blind-mask:attack=linear-layer", seen, truth) > 100
