"""What each protection does to an update, against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradleak.defenses import Clip, GaussianNoise, TopK, build
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.types import Update
from tests.laws.small import TwoTwins, batch_of, state_of, stream


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_top_k_keeps_the_largest_coordinates_unchanged(fraction: float) -> None:
    state, batch = state_of(TwoTwins), batch_of(2)
    clean = flat(FedSGD().mean(state, batch))
    sparse = flat(TopK(fraction)(FedSGD()).mean(state, batch))
    kept = sparse != 0
    assert int(kept.sum()) == -(-int(fraction * 100 * clean.numel()) // 100)
    assert torch.equal(sparse[kept], clean[kept])
    assert clean[~kept].abs().max() <= clean[kept].abs().min()


def test_top_k_by_tensor_keeps_a_share_of_each() -> None:
    state, batch = state_of(TwoTwins), batch_of(2)
    sparse = TopK(0.25, scope="tensor")(FedSGD()).mean(state, batch)
    for value in sparse.values.values():
        assert int((value != 0).sum()) == -(-value.numel() // 4)


@pytest.mark.parametrize(("norm", "expected"), [(1e-3, 1e-3), (1e6, None)])
def test_clip_scales_into_the_ball_and_keeps_the_direction(
    norm: float, expected: float | None
) -> None:
    state, batch = state_of(TwoTwins), batch_of(2)
    clean, clipped = (flat(m.mean(state, batch)) for m in (FedSGD(), Clip(norm)(FedSGD())))
    torch.testing.assert_close(float(clipped.norm()), expected or float(clean.norm()))
    torch.testing.assert_close(clipped / clipped.norm(), clean / clean.norm())


def test_a_zero_update_is_clipped_to_zero() -> None:
    values = Clip(1.0).map({"w": torch.zeros(3)})
    assert torch.equal(values["w"], torch.zeros(3))


def test_layers_apply_from_left_to_right() -> None:
    state, batch = state_of(TwoTwins), batch_of(1)
    noisy_last = build("clip:norm=0.001+gaussian-noise:std=0.1")(FedSGD())
    clipped_last = build("gaussian-noise:std=0.1+clip:norm=0.001")(FedSGD())
    assert flat(noisy_last.sample(state, batch, generator=stream(0))).norm() > 0.1
    torch.testing.assert_close(
        float(flat(clipped_last.sample(state, batch, generator=stream(0))).norm()), 0.001
    )
    assert noisy_last.log_prob(noisy_last.mean(state, batch), state, batch).isfinite()


def test_gaussian_log_prob_is_torch_distributions_own() -> None:
    state, batch = state_of(TwoTwins), batch_of(2)
    mechanism = GaussianNoise(0.05)(FedSGD())
    update = mechanism.sample(state, batch, generator=stream(4))
    reference = torch.distributions.Normal(flat(mechanism.mean(state, batch)), 0.05)
    torch.testing.assert_close(
        mechanism.log_prob(update, state, batch), reference.log_prob(flat(update)).sum()
    )


@pytest.mark.parametrize(
    ("spec", "clue"),
    [
        ("gausian-noise", "gaussian-noise"),
        ("gaussian-noise:sdt=1", "std"),
        ("gaussian-noise:std=-1", "≥ 0"),
        ("gaussian-noise:std=many", "a number"),
        ("gaussian-noise:std", "ID:field=value"),
        ("gaussian-noise:std=1,std=2", "twice"),
        ("top-k:fraction=0", "(0, 1]"),
        ("top-k:scope=layer", "tensor"),
        ("clip:norm=0", "positive"),
        ("clip:norm=1+nosie", "unknown defense"),
    ],
)
def test_a_bad_spec_says_what_was_expected(spec: str, clue: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build(spec)
    assert clue in str(error.value)
    assert "\n" not in str(error.value)
