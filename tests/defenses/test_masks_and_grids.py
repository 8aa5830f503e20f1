"""Masks, partial sharing, rounding, quantisation and signs against scipy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from gradleak.defenses import (
    GaussianNoise,
    LaplaceNoise,
    PartialSharing,
    Quantize,
    RandomMask,
    Round,
    Sign,
    TopK,
    build,
)
from gradleak.defenses.wrapped import Noise, log_mass
from gradleak.errors import IntractableLikelihood, InvalidInput
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.types import Update
from tests.laws.small import TwoTwins, batch_of, state_of, stream

STATE, BATCH = state_of(TwoTwins), batch_of(2)
CLEAN = FedSGD().mean(STATE, BATCH).values
NOISES = {
    "gaussian-noise": (GaussianNoise(0.03), stats.norm(scale=0.03)),
    "laplace-noise": (LaplaceNoise(0.03), stats.laplace(scale=0.03 / 2**0.5)),
}


def flat(values: dict[str, Tensor]) -> np.ndarray:
    return torch.cat([values[k].flatten() for k in CLEAN]).numpy()


def drawn(spec: str, seed: int = 0) -> tuple[np.ndarray, float]:
    """One update of the composition and its log-probability at the true batch."""
    mechanism = build(spec)(FedSGD())
    update = mechanism.sample(STATE, BATCH, generator=stream(seed))
    return flat(dict(update.values)), float(mechanism.log_prob(update, STATE, BATCH))


@pytest.mark.parametrize("name", NOISES)
def test_log_mass_is_the_integral_of_the_density_also_in_the_tails(name: str) -> None:
    noise, law = NOISES[name]
    for low, high in ((-0.01, 0.02), (0.0, 1e-4), (0.3, 0.31), (-1.0, -0.99), (0.5, 2.0)):
        nearest = min(abs(low), abs(high)) if low * high > 0 else 0.0
        peak = law.logpdf(nearest)
        area = integrate.quad(lambda x, peak=peak: math.exp(law.logpdf(x) - peak), low, high)[0]
        found = log_mass(noise, *(torch.tensor(v, dtype=torch.float64) for v in (low, high)))
        assert float(found) == pytest.approx(peak + math.log(area), rel=1e-7)


@pytest.mark.parametrize("name", NOISES)
def test_the_gradient_of_log_mass_is_finite_and_right_far_out_in_single_precision(
    name: str,
) -> None:
    noise: Noise = NOISES[name][0]
    for centre in (-30.0, -0.01, 0.0, 0.02, 30.0):
        found = []
        for dtype in (torch.float32, torch.float64):
            c = torch.tensor(centre, dtype=dtype, requires_grad=True)
            log_mass(noise, -0.01 - c, 0.01 - c).backward()
            assert c.grad is not None
            found.append(float(c.grad))
        assert found[0] == pytest.approx(found[1], rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("name", NOISES)
def test_noise_on_a_secret_mask_is_a_mixture(name: str) -> None:
    law = NOISES[name][1]
    u, found = drawn(f"random-mask:share=0.3+{name}:std=0.03")
    mixture = np.log(0.7 * law.pdf(u - flat(CLEAN)) + 0.3 * law.pdf(u))
    assert found == pytest.approx(mixture.sum(), rel=1e-9)


@pytest.mark.parametrize("name", NOISES)
def test_a_secret_mask_on_noise_shows_its_zeros(name: str) -> None:
    law = NOISES[name][1]
    u, found = drawn(f"{name}:std=0.03+random-mask:share=0.3")
    sent = u != 0
    kept = np.log(0.7) + law.logpdf(u - flat(CLEAN))[sent]
    assert found == pytest.approx(kept.sum() + (~sent).sum() * np.log(0.3), rel=1e-9)


def test_noise_around_a_known_mask_counts_only_what_the_mask_lets_through() -> None:
    law = NOISES["gaussian-noise"][1]
    mask = flat(RandomMask(0.3, seed=5).map({k: torch.ones_like(v) for k, v in CLEAN.items()}))
    u, found = drawn("random-mask:share=0.3,seed=5+gaussian-noise:std=0.03")
    assert found == pytest.approx(law.logpdf(u - mask * flat(CLEAN)).sum(), rel=1e-9)
    u, found = drawn("gaussian-noise:std=0.03+random-mask:share=0.3,seed=5")
    assert found == pytest.approx(law.logpdf(u - flat(CLEAN))[mask != 0].sum(), rel=1e-9)


def test_a_known_mask_is_one_for_all_and_a_secret_one_is_not() -> None:
    known = RandomMask(0.4, seed=5)(FedSGD())
    secret = RandomMask(0.4)(FedSGD())
    zeros = [
        flat(dict(m.sample(STATE, BATCH, generator=stream(i)).values)) == 0
        for m in (known, secret)
        for i in (1, 2)
    ]
    assert (zeros[0] == zeros[1]).all()
    assert (zeros[2] != zeros[3]).any()
    assert stats.binomtest(int(zeros[2].sum()), len(zeros[2]), 0.4).pvalue > 1e-6


def test_without_noise_a_secret_mask_has_no_density_and_shows_its_support() -> None:
    mechanism = RandomMask(0.4)(FedSGD())
    with pytest.raises(IntractableLikelihood):
        mechanism.likelihood(batch_size=1)
    received = mechanism.sample(STATE, BATCH, generator=stream(0))
    predicted = mechanism.predict(received, STATE, BATCH).values
    assert (flat(dict(predicted)) == flat(dict(received.values))).all()


def test_a_secret_mask_under_noise_is_predicted_by_its_mean() -> None:
    mechanism = build("random-mask:share=0.4+gaussian-noise:std=0.03")(FedSGD())
    received = mechanism.sample(STATE, BATCH, generator=stream(0))
    predicted = flat(dict(mechanism.predict(received, STATE, BATCH).values))
    np.testing.assert_allclose(predicted, 0.6 * flat(CLEAN))


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_largest_of_noisy_values_bound_the_others(name: str, scope: str) -> None:
    law = NOISES[name][1]
    mechanism = build(f"{name}:std=0.03+top-k:fraction=0.3,scope={scope}")(FedSGD())
    update = mechanism.sample(STATE, BATCH, generator=stream(0))
    expected = 0.0
    sent_at_all = np.abs(flat(dict(update.values)))
    least = sent_at_all[sent_at_all > 0].min()
    for k, u in update.values.items():
        sent = (u != 0).numpy()
        most = least if scope == "global" else float(u[u != 0].abs().min())
        c = CLEAN[k].numpy()
        expected += law.logpdf(u.numpy() - c)[sent].sum()
        expected += np.log(law.cdf(most - c) - law.cdf(-most - c))[~sent].sum()
    found = mechanism.log_prob(update, STATE, BATCH)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_top_k_predicts_what_exceeds_the_smallest_value_kept() -> None:
    mechanism, other = TopK(0.2)(FedSGD()), batch_of(2, seed=9)
    received = mechanism.mean(STATE, BATCH)
    claimed = flat(FedSGD().mean(STATE, other).values)  # type: ignore[arg-type]
    u = flat(dict(received.values))
    least = max(abs(u[u != 0]).min(), abs(claimed[u != 0]).min())
    beyond = np.sign(claimed) * np.maximum(abs(claimed) - least, 0)
    predicted = flat(dict(mechanism.predict(received, STATE, other).values))
    np.testing.assert_allclose(predicted, np.where(u != 0, claimed, beyond))
    assert (beyond[u == 0] != 0).any()


@pytest.mark.parametrize("name", NOISES)
def test_noise_then_rounding_is_the_probability_of_the_cells(name: str) -> None:
    law = NOISES[name][1]
    u, found = drawn(f"{name}:std=0.03+round:step=0.02")
    assert np.abs(u / 0.02 - np.round(u / 0.02)).max() < 1e-9
    cells = law.cdf(u + 0.01 - flat(CLEAN)) - law.cdf(u - 0.01 - flat(CLEAN))
    assert found == pytest.approx(np.log(cells).sum(), rel=1e-9)


@pytest.mark.parametrize("name", NOISES)
def test_noise_then_signs_is_the_probability_of_half_lines(name: str) -> None:
    law = NOISES[name][1]
    u, found = drawn(f"{name}:std=0.03+sign")
    assert set(u) == {-1.0, 1.0}
    assert found == pytest.approx(law.logcdf(u * flat(CLEAN)).sum(), rel=1e-9)


def test_stochastic_rounding_is_a_coin_between_neighbours() -> None:
    u, found = drawn("round:rounding=stochastic,step=0.02")
    gap = np.abs(u - flat(CLEAN)) / 0.02
    assert gap.max() < 1
    assert found == pytest.approx(np.log1p(-gap).sum(), rel=1e-9)
    mechanism = Round(0.02, rounding="stochastic")(FedSGD())
    far = Update({k: v + 0.06 for k, v in CLEAN.items()}, "gradient")
    assert float(mechanism.log_prob(far, STATE, BATCH)) < -1e3 * len(flat(CLEAN))


@pytest.mark.parametrize("levels", [1, 3, 16])
def test_noise_on_quantised_values_is_a_mixture_of_two_atoms(levels: int) -> None:
    law = NOISES["gaussian-noise"][1]
    u, found = drawn(f"quantize:levels={levels}+gaussian-noise:std=0.03")
    step = np.concatenate([np.full(v.numel(), float(v.norm()) / levels) for v in CLEAN.values()])
    # The paper's own words: level l <= |v| levels / norm < l + 1, up with what exceeds l.
    size = np.abs(flat(CLEAN)) / step
    low = np.floor(size)
    sign = np.sign(flat(CLEAN))
    p = (1 - size + low) * law.pdf(u - sign * step * low)
    p += (size - low) * law.pdf(u - sign * step * (low + 1))
    assert found == pytest.approx(np.log(p).sum(), rel=1e-8)


def test_quantised_values_are_levels_of_the_norm() -> None:
    update = Quantize(4)(FedSGD()).sample(STATE, BATCH, generator=stream(0)).values
    for k, v in update.items():
        levels = v / CLEAN[k].norm() * 4
        torch.testing.assert_close(levels, levels.round())
        assert float(levels.abs().max()) <= 4
    with pytest.raises(IntractableLikelihood):
        Quantize(4)(FedSGD()).likelihood(batch_size=1)


def test_noise_alone_before_a_grid_or_signs_with_sizes_has_no_density() -> None:
    for spec in ("sign:scaled=true", "quantize", "round:rounding=stochastic", "clip"):
        with pytest.raises(IntractableLikelihood):
            build(f"gaussian-noise+{spec}")(FedSGD()).likelihood(batch_size=1)


@pytest.mark.parametrize("scaled", [False, True])
def test_signs_predict_only_what_has_the_other_sign(scaled: bool) -> None:
    mechanism, other = Sign(scaled)(FedSGD()), batch_of(2, seed=9)
    received = mechanism.mean(STATE, BATCH)
    claim = FedSGD().mean(STATE, other).values
    predicted = mechanism.predict(received, STATE, other).values
    for k, c in claim.items():
        signs, size = CLEAN[k].sign(), c.abs().mean()
        wrong = torch.where(c.sign() == signs, 0.0, c) / size
        expected = (signs + wrong) * (size if scaled else 1)
        torch.testing.assert_close(predicted[k], expected)


def test_rounding_predicts_only_what_leaves_the_cell() -> None:
    mechanism, other = Round(0.02)(FedSGD()), batch_of(2, seed=9)
    received = mechanism.mean(STATE, BATCH)
    gap = flat(FedSGD().mean(STATE, other).values) - flat(dict(received.values))  # type: ignore[arg-type]
    found = flat(dict(mechanism.predict(received, STATE, other).values))
    expected = np.sign(gap) * np.maximum(np.abs(gap) - 0.01, 0)
    np.testing.assert_allclose(found - flat(dict(received.values)), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("withheld", "names"),
    [
        ("first:1", {"first.weight", "first.bias"}),
        ("last:2", {"other_twin.weight", "other_twin.bias", "head.weight", "head.bias"}),
        ("head", {"head.weight", "head.bias"}),
        ("twin.bias/head", {"twin.bias", "head.weight", "head.bias"}),
    ],
)
def test_partial_sharing_withholds_layers_by_place_or_name(withheld: str, names: set[str]) -> None:
    sent = PartialSharing(withheld)(FedSGD()).mean(STATE, BATCH).values
    assert {k for k, v in sent.items() if not v.any()} == names
    assert all(torch.equal(sent[k], v) for k, v in CLEAN.items() if k not in names)


def test_partial_sharing_finds_layers_inside_others() -> None:
    """A denoiser's time layers stand in every block; a full name goes before what is inside."""
    names = ["time.weight", "down.0.time.weight", "up.1.time.bias", "up.1.times.bias", "last.bias"]
    inside = [n for n in names if n != "time.weight"]
    assert PartialSharing("time").hidden(names) == {"time.weight"}
    assert PartialSharing("time").hidden(inside) == {"down.0.time.weight", "up.1.time.bias"}
    assert PartialSharing("up/last").hidden(names) == set(names[2:])


def test_what_is_withheld_tells_nothing() -> None:
    law = NOISES["gaussian-noise"][1]
    u, found = drawn("gaussian-noise:std=0.03+partial-sharing:withheld=head")
    sent = u != 0
    assert found == pytest.approx(law.logpdf(u - flat(CLEAN))[sent].sum(), rel=1e-9)


@pytest.mark.parametrize(
    ("spec", "clue"),
    [
        ("random-mask:share=1", "[0, 1)"),
        ("random-mask:share=-0.1", "[0, 1)"),
        ("quantize:levels=0", "at least 1"),
        ("round:step=0", "positive"),
        ("round:rounding=up", "nearest"),
        ("partial-sharing:withheld=first:0", "first:N"),
        ("partial-sharing:withheld=middle:1", "first:N"),
        ("partial-sharing:withheld=last:9", "the network has 4 layers"),
        ("partial-sharing:withheld=haed", "head"),
        ("clip:scope=layer", "example"),
        ("gaussian-noise+clip:scope=example", "fedsgd"),
    ],
)
def test_a_bad_spec_says_what_was_expected(spec: str, clue: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build(spec)(FedSGD()).mean(STATE, BATCH)
    assert clue in str(error.value)
    assert "\n" not in str(error.value)


def test_frozen_layers_are_fixed_while_the_others_train() -> None:
    """Three local steps of plain PyTorch with those layers' gradients switched off."""
    core = FedAvg(steps=3, learning_rate=0.5)
    model = TwoTwins().double()
    model.load_state_dict(dict(STATE.params))
    model.first.requires_grad_(False)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(BATCH.inputs), BATCH.labels).backward()
        optimiser.step()
    client = PartialSharing("first:1", frozen=True)(core)
    sent = client.mean(STATE, BATCH).values
    for k, v in model.named_parameters():
        torch.testing.assert_close(sent[k], v.detach() - STATE.params[k])
    withheld = PartialSharing("first:1")(core).mean(STATE, BATCH).values
    assert float((withheld["head.weight"] - sent["head.weight"]).abs().max()) > 1e-4
    plain = [PartialSharing(frozen=f)(FedSGD()).mean(STATE, BATCH).values for f in (True, False)]
    assert all(torch.equal(plain[0][k], v) for k, v in plain[1].items())


def test_noise_on_frozen_layers_is_that_on_withheld_ones() -> None:
    for spec in (
        "gaussian-noise:std=0.03+partial-sharing:withheld=head{}",
        "partial-sharing:withheld=head{}+gaussian-noise:std=0.03",
    ):
        found = [drawn(spec.format(end))[1] for end in ("", ",frozen=true")]
        assert found[1] == pytest.approx(found[0], rel=1e-12)
