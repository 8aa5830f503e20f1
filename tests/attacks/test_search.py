"""Searches against SciPy, torch.optim and analytic optima; the trial axis against single trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import gradleak as gl
from gradleak.attacks import InvertingGradients
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.search import Best, Search, adam, halvings, step_decay
from gradleak.attacks.parts.unknowns import Variables
from gradleak.data import load
from gradleak.models import build
from gradleak.seeding import target_generator
from gradleak.types import ModelState
from tests.laws.small import stream


@dataclass(frozen=True)
class Toy:
    """Stands where an objective stands: a function of x (trials, n) to (trials,)."""

    function: Callable[[Tensor], Tensor]
    targets: tuple[int, ...]
    unknown: object = None
    progress: Callable[[float], None] = lambda share: None

    def value_and_gradient(
        self, variables: Variables, trials: Sequence[int]
    ) -> tuple[Tensor, Variables]:
        x = variables["x"].detach().requires_grad_()
        values = self.function(x)
        return values.detach(), {"x": torch.autograd.grad(values.sum(), x)[0]}


class Free:
    def project_(self, variables: Variables) -> None:
        pass


def toy(function: Callable[[Tensor], Tensor], trials: int) -> Toy:
    return Toy(function, tuple(range(trials)), Free())


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def quadratic(size: int, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    generator = stream(seed)
    root = torch.randn((size, size), generator=generator, dtype=torch.float64)
    matrix = root @ root.T + 0.01 * torch.eye(size, dtype=torch.float64)
    best = torch.randn(size, generator=generator, dtype=torch.float64)
    return lambda x: (((x - best) @ matrix) * (x - best)).sum(1) / 2, best


def test_lbfgs_reaches_the_optimum_of_a_linear_gaussian_client() -> None:
    function, best = quadratic(30, 0)
    start = {"x": torch.randn((4, 30), generator=stream(1), dtype=torch.float64)}
    found = lbfgs(toy(function, 4), start, steps=200)  # type: ignore[arg-type]
    torch.testing.assert_close(found.variables["x"], best.expand(4, 30), rtol=0, atol=1e-6)


@pytest.mark.parametrize("history", [3, 100])
def test_lbfgs_solves_rosenbrock_in_about_scipys_evaluations(history: int) -> None:
    """A curved valley of 20 dimensions; SciPy's L-BFGS-B is the yardstick, within a factor 2."""
    x0 = np.full(20, -0.5)
    peer = scipy.optimize.minimize(
        lambda x: (float(rosenbrock(torch.tensor(x)[None])), _gradient(x)),
        x0,
        jac=True,
        method="L-BFGS-B",
        options={"maxcor": history, "maxiter": 500, "ftol": 0},
    )
    found = lbfgs(
        toy(rosenbrock, 1),
        {"x": torch.tensor(x0)[None]},
        steps=500,
        history=history,  # type: ignore[arg-type]
        solved=[max(float(peer.fun), 1e-12)],
    )
    assert found.status == ["solved"]
    assert found.evaluations[0] <= 2 * peer.nfev


def _gradient(x: np.ndarray) -> np.ndarray:
    leaf = torch.tensor(x)[None].requires_grad_()
    return torch.autograd.grad(rosenbrock(leaf).sum(), leaf)[0][0].numpy()


@pytest.mark.parametrize("search", [lbfgs, adam], ids=["lbfgs", "adam"])
def test_a_trial_goes_the_same_way_alone_and_among_others(search: Callable) -> None:
    start = torch.randn((3, 5), generator=stream(2), dtype=torch.float64)
    options = {"steps": 40} if search is lbfgs else {"steps": 40, "learning_rate": 0.1}
    together = search(toy(rosenbrock, 3), {"x": start}, **options)
    for trial in range(3):
        alone = search(toy(rosenbrock, 1), {"x": start[trial : trial + 1]}, **options)
        torch.testing.assert_close(alone.variables["x"][0], together.variables["x"][trial])
        assert alone.evaluations[0] == together.evaluations[trial]


def test_adam_is_torch_optims_adam() -> None:
    function, _ = quadratic(6, 3)
    x0 = torch.randn((1, 6), generator=stream(4), dtype=torch.float64)
    leaf = x0.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=0.05)
    lowest = torch.inf
    for _ in range(50):
        optimiser.zero_grad()
        value = function(leaf).sum()
        value.backward()
        lowest = min(lowest, float(value.detach()))
        optimiser.step()
    found = adam(
        toy(function, 1),
        {"x": x0},
        steps=50,
        learning_rate=0.05,
        schedule=lambda *_: 1.0,  # type: ignore[arg-type]
    )
    assert float(found.values[0]) == pytest.approx(lowest, rel=1e-12)


def test_signed_steps_are_those_of_the_sign() -> None:
    x0 = torch.tensor([[3.0, -2.0]], dtype=torch.float64)
    found = adam(
        toy(lambda x: (x**2).sum(1), 1),
        {"x": x0},
        steps=3,
        learning_rate=0.5,
        signed=True,  # type: ignore[arg-type]
        schedule=lambda *_: 1.0,
    )
    torch.testing.assert_close(found.variables["x"], torch.tensor([[2.0, -1.0]]).double())


def poisoned(x: Tensor) -> Tensor:
    """A bowl whose value is not a number where the first coordinate exceeds 10."""
    bowl = (x**2).sum(1)
    return torch.where(x[:, 0] > 10, torch.nan, bowl)


@pytest.mark.parametrize("search", [lbfgs, adam], ids=["lbfgs", "adam"])
def test_a_diverged_trial_is_frozen_and_its_neighbours_go_on(search: Callable) -> None:
    start = {"x": torch.tensor([[1.0, 1.0], [11.0, 1.0], [2.0, 0.0]], dtype=torch.float64)}
    options = {"steps": 30} if search is lbfgs else {"steps": 300, "learning_rate": 0.2}
    found = search(toy(poisoned, 3), start, **options)
    assert [s == "diverged" for s in found.status] == [False, True, False]
    assert found.evaluations[1] == 1
    assert not torch.isfinite(found.values[1])
    assert found.values[[0, 2]].max() < 1e-2
    assert torch.equal(found.variables["x"][1], start["x"][1])


def test_frozen_trials_leave_the_others_their_exact_path() -> None:
    """Adam's moments of a living trial do not notice that a neighbour died."""
    start = torch.tensor([[11.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    options = {"steps": 50, "learning_rate": 0.2}
    together = adam(toy(poisoned, 2), {"x": start}, **options)  # type: ignore[arg-type]
    alone = adam(toy(poisoned, 1), {"x": start[1:]}, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(together.variables["x"][1], alone.variables["x"][0])


def test_lbfgs_steps_back_from_a_cliff() -> None:
    def cliff(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] < 0, torch.inf, (x[:, 0] - 0.01) ** 2 + x[:, 1] ** 2)

    found = lbfgs(toy(cliff, 1), {"x": torch.tensor([[5.0, 3.0]]).double()}, steps=50)  # type: ignore[arg-type]
    assert float(found.values[0]) < 1e-12


def test_the_iterate_kept_is_the_one_scored() -> None:
    found = adam(
        toy(lambda x: (x**2).sum(1), 1),
        {"x": torch.tensor([[0.3]]).double()},  # type: ignore[arg-type]
        steps=25,
        learning_rate=1.0,
        schedule=lambda *_: 1.0,
    )
    kept = found.variables["x"]
    assert float(found.values[0]) == pytest.approx(float((kept**2).sum()), rel=1e-12)
    assert float(found.values[0]) <= 0.09


def test_one_solved_trial_ends_the_search_for_its_target() -> None:
    start = {"x": torch.tensor([[0.0, 0.0], [-1.5, 2.0]]).double() + 1e-9}
    objective = Toy(rosenbrock, (0, 0), Free())
    found = lbfgs(objective, start, steps=500, solved=[1e3])  # type: ignore[arg-type]
    assert found.status == ["solved", "solved"] or "solved" in found.status
    assert max(found.evaluations) == 1


def test_step_decay_divides_at_three_five_and_seven_eighths() -> None:
    rates = [step_decay(step, 800) for step in (0, 299, 300, 499, 500, 699, 700, 799)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_halvings_leave_one_trial() -> None:
    assert halvings(1) == ()
    assert halvings(2) == (0.5,)
    assert halvings(5) == halvings(8) == (0.125, 0.25, 0.5)


def raised(x: Tensor) -> Tensor:
    """A valley of Rosenbrock's above a floor that every trial carries as its first entry."""
    return rosenbrock(x[:, 1:]) + x[:, 0].detach()


FLOORS = (3.0, 4.0, 1.0, 0.0, 2.0, 5.0, 1.0)
OWNERS = (0, 1, 0, 0, 0, 1, 1)


def raced(search: Callable, trials: Sequence[int] = range(7), steps: int = 40) -> Search:
    rows = [[FLOORS[t], -1.2, 1.0, -0.5, 1.0] for t in trials]
    objective = Toy(raised, tuple(OWNERS[t] for t in trials), Free())
    rate = {} if search is lbfgs else {"learning_rate": 0.02}
    start = {"x": torch.tensor(rows).double()}
    found: Search = search(objective, start, steps=steps, halving=(0.25, 0.5), **rate)
    return found


def survivors(found: Search) -> list[int]:
    return [t for t, status in enumerate(found.status) if status != "dropped"]


@pytest.mark.parametrize("search", [lbfgs, adam], ids=["lbfgs", "adam"])
def test_halving_keeps_the_best_trial_of_every_target(
    search: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = raced(search)
    assert survivors(found) == [3, 6]
    assert [found.evaluations[t] for t in (0, 4, 2, 1, 5)] == [10, 10, 20, 20, 10]
    full = found.evaluations[3]
    assert full == found.evaluations[6] > 20
    monkeypatch.setattr(Best, "_rank", lambda best, t: (-float(best.values[t]), t))
    assert survivors(raced(search)) == [0, 5], "planted fault: the worse half stays"


@pytest.mark.parametrize("search", [lbfgs, adam], ids=["lbfgs", "adam"])
def test_halving_one_target_does_not_touch_another(search: Callable) -> None:
    together = raced(search)
    for target in (0, 1):
        own = [t for t in range(7) if OWNERS[t] == target]
        alone = raced(search, own)
        assert alone.status == [together.status[t] for t in own]
        assert alone.evaluations == [together.evaluations[t] for t in own]
        torch.testing.assert_close(alone.variables["x"], together.variables["x"][own])


def test_of_equal_trials_the_earlier_stays_and_the_last_is_never_dropped() -> None:
    best = Best({"x": torch.zeros(5, 1)})
    best.values[:] = torch.tensor([1.0, 1.0, 1.0, torch.inf, 7.0])
    assert best.drop_worse_half([0, 1, 2, 3], [0] * 5) == {2, 3}
    assert best.drop_worse_half([4], [0] * 5) == set()
    assert best.status == ["exhausted", "exhausted", "dropped", "dropped", "exhausted"]


def test_a_diverged_trial_takes_no_place_in_the_better_half() -> None:
    start = {"x": torch.tensor([[11.0, 1.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)}
    objective = Toy(poisoned, (0, 0, 0), Free())
    found = adam(objective, start, steps=20, learning_rate=0.01, halving=(0.5,))  # type: ignore[arg-type]
    assert found.status == ["diverged", "exhausted", "dropped"]


@dataclass(frozen=True)
class Faded(Toy):
    """fit_weight · fit + penalty, read from the two entries of x."""

    fit_weight: float = 1.0

    def value_and_gradient(
        self, variables: Variables, trials: Sequence[int]
    ) -> tuple[Tensor, Variables]:
        x = variables["x"]
        return self.fit_weight * x[:, 0] + x[:, 1], {"x": torch.zeros_like(x)}


@pytest.mark.parametrize(("share", "kept"), [(0.4, 0), (0.8, 1)])
def test_trials_are_compared_at_one_factor(share: float, kept: int) -> None:
    """Values 1 and 2.1 at factor 0.1, then 10 and 3 at factor 1: the first trial's 1 is past."""
    start = {"x": torch.tensor([[10.0, 0.0], [1.0, 2.0]], dtype=torch.float64)}
    whole = Faded(rosenbrock, (0, 0), Free())
    faded = replace(whole, fit_weight=0.1)
    found = adam(
        whole,  # type: ignore[arg-type]
        start,
        steps=10,
        learning_rate=0.1,
        path=lambda step, steps: faded if step < 5 else whole,  # type: ignore[arg-type,return-value]
        halving=(share,),
    )
    assert survivors(found) == [kept]
    assert int(found.values.argmin()) == kept


def test_a_recipe_halves_each_target_as_it_would_alone_and_says_so() -> None:
    digits = load("digits")
    state = ModelState.of(build("lenet-tiny", digits.spec, seed=0))
    threat = gl.ThreatModel()
    seen = [
        gl.simulate(gl.Scenario(digits, state, threat=threat), generator=stream(t))[0]
        for t in range(2)
    ]
    attack = InvertingGradients(steps=40, restarts=4, halving=True)
    streams = [target_generator(0, t) for t in range(2)]
    together = attack.on_group(seen, generators=streams, engine="loop")
    for t in range(2):
        alone = attack.on_group(seen[t : t + 1], generators=streams[t : t + 1], engine="loop")[0]
        torch.testing.assert_close(together[t].batch.inputs, alone.batch.inputs)
        assert alone.evaluations == together[t].evaluations == 40 + 20 + 2 * 10
        assert alone.message == "best of 4 restarts, 3 dropped early"
        assert alone.status == "exhausted"
