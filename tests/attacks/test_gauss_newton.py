"""L-BFGS in the units of a sketched Gauss–Newton model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.parts.distances import relative_squares, relative_weights
from gradleak.attacks.parts.gauss_newton import _sketched, gauss_newton
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.types import Batch, DataSpec, Observation
from tests.laws.elsewhere import ELSEWHERE, Elsewhere, moved
from tests.laws.small import stream

SPEC = DataSpec.image((1, 4, 4), 3)


class Uneven(nn.Module):
    """Smooth, and thirty times as sensitive to some pixels as to others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.logspace(-1.5, 0, 16, dtype=x.dtype, device=x.device)
        found: Tensor = self.head(torch.tanh(self.first(x.flatten(1) * scale)))
        return found


@pytest.fixture(scope="module")
def near() -> tuple[Objective, Variables, Tensor]:
    """An objective in float64, a start near the truth, and the truth."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = gl.types.ModelState.of(Uneven().double())
    images = torch.rand((1, 1, 4, 4), generator=stream(0), dtype=torch.float64)
    batch = Batch(images, torch.tensor([1]))
    update = gl.FedSGD().mean(state, batch)
    seen = Observation((gl.types.Exchange(state, update),), gl.FedSGD(), SPEC)
    unknown = Images(SPEC, 1, torch.tensor([[1]]), torch.float64, boxed=False, mean=0.5, std=0.2)
    fit = Matching([seen], relative_squares, dtype=torch.float64)
    noise = torch.randn((1, 1, 1, 4, 4), generator=stream(1), dtype=torch.float64)
    return Objective(unknown, fit), {"inputs": images[None] + 0.1 * noise}, images


def test_the_sketch_keeps_the_model(near: tuple[Objective, Variables, Tensor]) -> None:
    """Against the exact Jacobian: no direction is stretched by more than a few times."""
    objective, start, _ = near
    weights = relative_weights(objective.fit.received[0])

    def predicted(x: Tensor) -> Tensor:
        batch = Batch(x, torch.tensor([1]))
        found = gl.FedSGD().mean(objective.fit.state, batch).values
        return torch.cat([found[k].flatten() * weights[k].sqrt() for k in found])

    exact = torch.func.jacrev(predicted)(start["inputs"][0]).flatten(1)
    sketch = _sketched(objective, start, {}, 0, relative_weights)
    lower = torch.linalg.cholesky(exact.mT @ exact)
    inverse = torch.linalg.inv(lower)
    stretched = torch.linalg.eigvalsh(inverse @ (sketch @ sketch.mT) @ inverse.mT)
    assert 0.1 < float(stretched[0]) <= float(stretched[-1]) < 4


def test_few_steps_reach_rounding(near: tuple[Objective, Variables, Tensor]) -> None:
    objective, start, truth = near
    plain = lbfgs(objective, start, steps=12)
    found = gauss_newton(objective, start, weights=relative_weights, steps=12)
    assert float(found.values[0]) < 1e-4 * float(plain.values[0])
    assert torch.allclose(found.variables["inputs"][0], truth, atol=1e-6)
    assert found.status == ["solved"]
    assert found.evaluations[0] > 16  # those of the model count


def test_it_runs_where_the_network_is(near: tuple[Objective, Variables, Tensor]) -> None:
    objective, start, truth = near
    with Elsewhere():
        fit = Matching([moved(objective.fit.seen[0])], relative_squares, dtype=torch.float64)
        there = {k: v.to(ELSEWHERE) for k, v in start.items()}
        found = gauss_newton(replace(objective, fit=fit), there, weights=relative_weights, steps=12)
        assert torch.allclose(found.variables["inputs"][0].cpu(), truth, atol=1e-6)


def test_every_trial_keeps_its_own_point(near: tuple[Objective, Variables, Tensor]) -> None:
    objective, start, _ = near
    twice = replace(objective, targets=(0, 0))
    both = {"inputs": torch.cat([start["inputs"], start["inputs"] + 0.05])}
    found = gauss_newton(twice, both, weights=relative_weights, steps=12)
    alone = gauss_newton(objective, start, weights=relative_weights, steps=12)
    assert torch.equal(found.variables["inputs"][:1], alone.variables["inputs"])
    assert len(found.status) == len(found.evaluations) == 2
