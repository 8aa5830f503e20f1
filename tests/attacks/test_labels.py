"""Label recovery inside and just outside its theory."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import gradleak as gl
from gradleak.attacks.parts.labels import idlg, sign_counts
from gradleak.data import load
from gradleak.errors import NotApplicable
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models import build
from gradleak.types import Batch, Mechanism, ModelState, Observation
from tests.laws.small import stream


def seen_from(
    model: nn.Module | ModelState, batch: Batch, mechanism: Mechanism | None = None
) -> Observation:
    mechanism = mechanism or FedSGD()
    state = model if isinstance(model, ModelState) else ModelState.of(model)
    digits = load("digits")
    return gl.observe(
        state,
        update=mechanism.sample(state, batch, generator=stream(0)).values,
        kind=mechanism.kind,
        mechanism=mechanism,
        data=digits.spec,
        batch_size=len(batch),
    )


@pytest.mark.parametrize("name", ["mlp", "lenet", "lenet-tiny", "convnet"])
@pytest.mark.parametrize("mechanism", [FedSGD(), FedAvg(steps=3)], ids=["fedsgd", "fedavg"])
def test_idlg_is_exact_for_one_example(name: str, mechanism: Mechanism) -> None:
    digits = load("digits")
    model = build(name, digits.spec, seed=0)
    for index in range(0, 100, 10):
        batch = digits.batch([index])
        assert torch.equal(idlg(seen_from(model, batch, mechanism)), batch.labels)


def test_row_sums_serve_where_the_head_has_no_bias() -> None:
    digits = load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10, bias=False))
    for index in range(10):
        batch = digits.batch([index])
        assert torch.equal(idlg(seen_from(model, batch)), batch.labels)


def test_the_order_of_a_recorded_update_does_not_matter() -> None:
    """A safetensors file gives its tensors back in any order."""
    digits = load("digits")
    seen = seen_from(build("mlp", digits.spec, seed=0), digits.batch([7]))
    values = dict(reversed(seen.update.values.items()))
    shuffled = gl.observe(seen.state, update=values, data=digits.spec, batch_size=1)
    assert list(shuffled.update.values) == list(seen.state.params)
    assert torch.equal(idlg(shuffled), digits.batch([7]).labels)


def test_idlg_does_not_claim_a_batch() -> None:
    digits = load("digits")
    seen = seen_from(build("mlp", digits.spec, seed=0), digits.batch([0, 1]))
    with pytest.raises(NotApplicable, match="one example"):
        idlg(seen)


@pytest.mark.parametrize(("size", "share"), [(2, 1.0), (4, 1.0), (8, 0.95)])
def test_sign_counts_on_an_untrained_network(size: int, share: float) -> None:
    """20 batches; guessing distinct classes overlaps by 0.19, 0.34, 0.57 (4000 draws)."""
    digits = load("digits")
    model = build("mlp", digits.spec, seed=0)
    generator, overlap = stream(1), 0
    for _ in range(20):
        batch = digits.batch(torch.randint(len(digits), (size,), generator=generator))
        found, true = (
            Counter(x.tolist()) for x in (sign_counts(seen_from(model, batch)), batch.labels)
        )
        overlap += (found & true).total()
    assert overlap / (20 * size) >= share


def test_a_network_without_a_head_is_refused() -> None:
    digits = load("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.LayerNorm(10), nn.Softplus())
    model.append(nn.Unflatten(1, (1, 10))).append(nn.Conv1d(1, 1, 1)).append(nn.Flatten())
    with pytest.raises(NotApplicable, match="not a head"):
        idlg(seen_from(model, digits.batch([0])))
