"""Training in segments against the plain loop: equal numbers, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gradleak import models
from gradleak.attacks.parts import memory
from gradleak.mechanisms import FedAvg, unroll
from gradleak.types import Batch, DataSpec, ModelState
from tests.laws.small import Normalised, TwoTwins, batch_of, state_of, stream

TRIALS, SIZE = 3, 2


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unroll, "PLAIN_STEPS", 10**6)


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def differentiated(
    mechanism: FedAvg, state: ModelState, *, vmapped: bool, soft: bool
) -> list[Tensor]:
    """Updates of three trials, and the gradient of a random projection of them."""
    inputs = torch.stack([batch_of(SIZE, seed=i).inputs for i in range(TRIALS)]).requires_grad_()
    logits = torch.randn((TRIALS, SIZE, 3), generator=stream(1), dtype=torch.float64)
    hard = torch.tensor([[0, 1], [2, 2], [1, 0]])
    labels = logits.requires_grad_() if soft else hard

    def update(x: Tensor, y: Tensor) -> Tensor:
        values = mechanism.mean(state, Batch(x, y.softmax(-1) if soft else y)).values
        return torch.cat([v.flatten() for v in values.values()])

    if vmapped:
        out = torch.func.vmap(update)(inputs, labels)
    else:
        out = torch.stack([update(x, y) for x, y in zip(inputs, labels, strict=True)])
    weights = torch.randn(out.shape, generator=stream(2), dtype=torch.float64)
    leaves = [inputs, labels] if soft else [inputs]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("vmapped", [False, True], ids=["loop", "vmap"])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
@pytest.mark.parametrize("network", [TwoTwins, Normalised])
@pytest.mark.parametrize(
    "mechanism",
    [
        FedAvg(steps=unroll.PLAIN_STEPS + 1, learning_rate=0.3, minibatch_size=1),
        FedAvg(steps=19, learning_rate=0.3, batch_norm="train"),
    ],
)
def test_segments_give_the_gradients_of_the_plain_loop(
    mechanism: FedAvg,
    network: type[nn.Module],
    soft: bool,
    vmapped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = state_of(network)
    found = differentiated(mechanism, state, vmapped=vmapped, soft=soft)
    plainly(monkeypatch)
    for a, b in zip(found, differentiated(mechanism, state, vmapped=vmapped, soft=soft)):
        assert gap(a, b) <= 1e-12


def test_a_gradient_of_the_gradient_is_that_of_the_plain_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state, mechanism = state_of(TwoTwins), FedAvg(steps=12, learning_rate=0.3)

    def curvature() -> Tensor:
        batch = batch_of(2)
        inputs = batch.inputs.requires_grad_()
        values = mechanism.mean(state, Batch(inputs, batch.labels)).values.values()
        size = torch.stack([v.square().sum() for v in values]).sum()
        (slope,) = torch.autograd.grad(size, inputs, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), inputs)[0]

    found = curvature()
    plainly(monkeypatch)
    assert gap(found, curvature()) <= 1e-12


@pytest.mark.parametrize("count", [1, unroll.PLAIN_STEPS, unroll.PLAIN_STEPS + 1, 32, 1000])
def test_segments_are_all_steps_in_order(count: int) -> None:
    order = [(i,) for i in range(count)]
    parts = list(unroll.segments(order))
    assert [visit for part in parts for visit in part] == order
    assert (len(parts) == 1) == (count <= unroll.PLAIN_STEPS)
    longest = max(map(len, parts))
    assert longest + len(parts) <= max(unroll.PLAIN_STEPS + 1, 3 * count**0.5)


def peak(steps: int, *, batch_size: int) -> int:
    spec = DataSpec.image((3, 32, 32), 10)
    state = ModelState.of(models.build("convnet", spec, seed=0))
    mechanism = FedAvg(steps=steps)
    return memory.of_step(mechanism, state, spec, batch_size=batch_size)


def test_thirty_two_steps_take_at_most_twice_the_memory_of_four(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    four = {size: peak(4, batch_size=size) for size in (1, 8)}
    for size in four:
        assert peak(32, batch_size=size) <= 2 * four[size]
    plainly(monkeypatch)
    assert peak(32, batch_size=1) > 4 * four[1]
