"""Inputs of a linear head lie in the row space of its gradient, as long as that has full rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.closed_form.row_space import row_space
from gradleak.data import load
from gradleak.defenses import build as build_defense
from gradleak.mechanisms import FedSGD
from gradleak.models import build
from gradleak.models.seeding import seeded
from gradleak.types import ModelState, Observation
from tests.laws.small import stream


def network(activation: type[nn.Module]) -> nn.Sequential:
    with seeded(2):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), activation(), nn.Linear(40, 10))


def seen_of(
    model: nn.Module, labels: list[int], *, defense: str = "none", dtype: torch.dtype
) -> tuple[Observation, Tensor]:
    """What a server sees of digits with these labels, and what enters the head."""
    digits = load("digits")
    taken: list[int] = []
    for label in labels:
        rows = torch.nonzero(digits.labels == label)[:, 0].tolist()
        taken.append(next(row for row in rows if row not in taken))
    scenario = gl.Scenario(
        digits,
        ModelState.of(model.to(dtype)),
        mechanism=build_defense(defense)(FedSGD()),
        batch_size=len(taken),
        indices=torch.tensor(taken),
    )
    seen, truth = gl.simulate(scenario, generator=stream(0))
    assert isinstance(model, nn.Sequential)
    return seen, model[:-1](truth.batch.inputs.to(dtype)).detach().double()


def outside(rows: Tensor, inputs: Tensor) -> float:
    return float((inputs - inputs @ rows.T @ rows).norm() / inputs.norm())


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.Sigmoid, nn.ReLU])
@pytest.mark.parametrize("labels", [[3], [1, 1, 5, 9], [0, 0, 1, 1, 2, 2, 3, 5, 7]])
def test_inputs_lie_in_it(activation: type[nn.Module], labels: list[int]) -> None:
    seen, inputs = seen_of(network(activation), labels, dtype=torch.float64)
    rows = row_space(seen, "3.weight")
    assert rows is not None
    assert outside(rows, inputs) < 1e-6
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(labels), dtype=torch.float64))


def test_those_of_another_batch_do_not() -> None:
    """A planted fault: the measure above can fail."""
    seen, _ = seen_of(network(nn.GELU), [1, 1, 5, 9], dtype=torch.float64)
    _, inputs = seen_of(network(nn.GELU), [2, 3, 4, 6], dtype=torch.float64)
    rows = row_space(seen, "3.weight")
    assert rows is not None
    assert outside(rows, inputs) > 0.05


def test_single_precision_moves_it_little() -> None:
    seen, inputs = seen_of(network(nn.GELU), [1, 1, 5, 9], dtype=torch.float32)
    rows = row_space(seen, "3.weight")
    assert rows is not None
    assert outside(rows, inputs) < 1e-3


@pytest.mark.parametrize(
    ("labels", "defense"),
    [
        (list(range(10)), "none"),
        ([1, 5], "gaussian-noise:std=0.001"),
        ([1, 5], "soteria:prune_rate=80"),
        ([1, 5], "top-k:fraction=0.1"),
    ],
    ids=["as many examples as classes", "noise", "masked", "sparse"],
)
def test_outside_its_range_it_says_nothing(labels: list[int], defense: str) -> None:
    seen, _ = seen_of(network(nn.GELU), labels, defense=defense, dtype=torch.float32)
    assert row_space(seen, "3.weight") is None


def test_errors_that_rounding_makes_equal_leave_no_full_rank() -> None:
    """Sigmoids behind small weights: two images of a class differ by less than rounding shows."""
    model = build("convnet", load("digits").spec, seed=1)
    assert isinstance(model, nn.Sequential)
    for place, layer in enumerate(model):
        if isinstance(layer, nn.ReLU):
            model[place] = nn.Sigmoid()
    name = list(dict(model.named_parameters()))[-2]
    assert row_space(seen_of(model, [1, 1, 5, 9], dtype=torch.float32)[0], name) is None
    assert row_space(seen_of(model, [1, 4, 5, 9], dtype=torch.float32)[0], name) is not None
