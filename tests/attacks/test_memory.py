"""Memory of a step: foretold exactly where that can be counted, shared out when it runs short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks import DLG
from gradleak.attacks.parts import memory
from gradleak.attacks.parts.memory import Limit
from gradleak.mechanisms import FedSGD
from gradleak.types import ModelState
from tests.attacks.test_objective import observations
from tests.laws.small import SPEC, stream

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 2 bytes"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


def test_the_peak_counts_what_lives_at_one_time() -> None:
    def run() -> None:
        a = torch.empty(1000, device="meta")
        b = a + 1  # 8000 bytes
        view = b[:10].view(2, 5)
        del a, b
        c = torch.empty(500, device="meta") * 2  # the view keeps 4000, c's parts are 4000
        del view, c
        torch.empty(1500, device="meta")

    assert memory.peak(run) == 8000


def test_tensors_from_outside_count_nothing() -> None:
    outside = torch.empty(10**6, device="meta")
    assert memory.peak(lambda: outside[:5].detach().view(5)) == 0


def test_a_step_is_the_graph_of_its_network() -> None:
    """x W: update, residual and cotangents are 4 · 16 · 3 bytes each; at least two live."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))
    state, weight = ModelState.of(model), 4 * 16 * 3
    step = memory.of_step(FedSGD(), state, SPEC, batch_size=1)
    assert 2 * weight <= step <= 8 * weight
    assert memory.of_round(FedSGD(), state, SPEC, batch_size=1) < step
    assert memory.of_step(FedSGD(), state, SPEC, batch_size=50) > 5 * step


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__ + str(e)[:12])
def test_running_out_of_memory_halves_what_steps_together(error: Exception) -> None:
    limit, asked = Limit(), []

    def evaluate(rows: slice) -> list[int]:
        asked.append(rows.stop - rows.start)
        if rows.stop - rows.start > 2:
            raise error
        return list(range(rows.start, rows.stop))

    parts = limit.in_parts(evaluate, 9, most=8)
    assert [row for part in parts for row in part] == list(range(9))
    assert asked == [8, 4, 2, 2, 2, 2, 1]
    asked.clear()
    limit.in_parts(evaluate, 5, most=8)
    assert asked == [2, 2, 1]  # what was learned is kept


def test_what_is_done_stays_done() -> None:
    asked: list[tuple[int, int]] = []

    def evaluate(rows: slice) -> None:
        asked.append((rows.start, rows.stop))
        if asked == [(0, 4), (4, 8)]:
            raise MemoryError

    Limit().in_parts(evaluate, 8, most=4)
    assert asked == [(0, 4), (4, 8), (4, 6), (6, 8)]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), MemoryError()])
def test_what_cannot_be_helped_is_raised(error: Exception) -> None:
    def evaluate(rows: slice) -> None:
        raise error

    limit = Limit(1) if isinstance(error, MemoryError) else Limit()
    with pytest.raises(type(error)):
        limit.in_parts(evaluate, 4, most=4)


def test_an_objective_short_of_memory_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = DLG().compose(observations(FedSGD(), 5))
    objective = replace(objective, targets=tuple(range(5)), engine="vmap")
    variables = objective.unknown.start(stream(0), restarts=5)
    values, gradients = objective.value_and_gradient(variables, range(5))

    sizes = []
    plenty = type(objective.fit).__call__

    def short(self: object, inputs: Tensor, labels: Tensor, targets: Sequence[int]) -> Tensor:
        sizes.append(len(targets))
        if len(targets) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plenty(objective.fit, inputs, labels, targets)

    monkeypatch.setattr(type(objective.fit), "__call__", short)
    fewer, fewer_gradients = objective.value_and_gradient(variables, range(5))
    assert sizes == [5, 2, 2, 1]
    assert objective.trials_at_once == 2
    torch.testing.assert_close(fewer, values, rtol=1e-10, atol=1e-14)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fewer_gradients[name], gradient, rtol=1e-8, atol=1e-12)


def test_a_limit_given_beforehand_is_kept() -> None:
    objective = DLG().compose(observations(FedSGD(), 5))
    assert replace(objective, engine="fast", limit=Limit(3)).trials_at_once == 3
    assert replace(objective, engine="vmap", limit=Limit(1)).trials_at_once == 1
