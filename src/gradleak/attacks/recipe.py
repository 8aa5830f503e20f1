"""The outline every gradient-inversion recipe fills in: compose an objective, search, choose."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from gradleak.attacks.parts.memory import Limit
from gradleak.attacks.parts.needs import require
from gradleak.attacks.parts.objective import Engine, Objective, calibrated
from gradleak.attacks.parts.search import Search, halvings
from gradleak.attacks.parts.unknowns import Variables
from gradleak.defenses import gathered
from gradleak.types import About, Batch, Observation, Reconstruction


class Recipe(ABC):
    """A paper's composition of unknown, fit, penalties and search.

    A recipe attacks several targets that share a broadcast state in one vectorised program; one
    observation is the special case.
    """

    about: ClassVar[About]
    budgets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields to override for the audit budgets "quick" and "thorough"."""

    dtype: ClassVar[torch.dtype] = torch.float64
    """Precision of the search."""
    copies: ClassVar[int] = 400
    """Copies of its variables that a search keeps at most: L-BFGS fills 2 · 2 · 100 vectors."""

    one_by_one: ClassVar[bool] = False
    """Whether trials cannot share a program, whatever the engine asked for."""
    crowd: ClassVar[int] = 1
    """Candidates of every example that a step holds at most."""

    steps: int
    restarts: int
    halving: bool = False
    """Whether restarts are dropped on the way; a recipe that can makes this a field."""

    def beside(self, coordinates: int) -> int:
        """Bytes that a search for batches of so many coordinates holds beside its steps."""
        return 0

    @property
    def cuts(self) -> tuple[float, ...]:
        """Shares of the budget at which every target drops the worse half of its restarts."""
        return halvings(self.restarts) if self.halving else ()

    @abstractmethod
    def compose(self, seen: Sequence[Observation]) -> Objective:
        """The objective, for observations that share a state; trial axis and engine unset."""

    def composed(self, seen: Sequence[Observation]) -> Objective:
        """The objective of all rounds together, where the protection lets them tell more."""
        return self.compose([gathered(o) for o in seen])

    @abstractmethod
    def search(self, objective: Objective, start: Variables) -> Search:
        """Minimise the objective from `start`."""

    def starts(self, objective: Objective, generators: Sequence[torch.Generator]) -> Variables:
        """Where the trials of every target start, target by target."""
        drawn = [objective.unknown.start(g, restarts=self.restarts) for g in generators]
        return {k: torch.cat([d[k] for d in drawn]) for k in drawn[0]}

    def refine(self, objective: Objective, start: Variables) -> Search:
        """Minimise the objective from a claim that is thought to be good already."""
        return self.search(objective, start)

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        return self.on_group([seen], generators=[generator])[0]

    def on_group(
        self,
        seen: Sequence[Observation],
        *,
        generators: Sequence[torch.Generator],
        engine: Engine = "auto",
        trials_at_once: int | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> list[Reconstruction]:
        """Attack every observation; the i-th starts as it would alone with `generators[i]`.

        Args:
            seen: observations that share a broadcast state.
            generators: the attacker's stream for each of them.
            engine: how trials run together; "auto" measures.
            trials_at_once: most trials that may step together; None leaves it to the engine.
            progress: told the share of the search's budget spent.

        Raises:
            NotApplicable: a needed fact, modality or structure is missing.
        """
        for observation in seen:
            require(self.about, observation)
        objective = self.composed(seen)
        targets = tuple(i for i in range(len(seen)) for _ in range(self.restarts))
        limit = Limit(trials_at_once or sys.maxsize)
        objective = replace(
            objective,
            targets=targets,
            progress=progress,
            limit=limit,
            streams=tuple(generators),
        )
        start = _where_it_runs(objective, self.starts(objective, generators))
        objective = self._settled(objective, start, engine)
        return _choose(objective, self.search(objective, start), len(seen))

    def refined(
        self,
        seen: Sequence[Observation],
        claims: Sequence[Batch],
        *,
        engine: Engine = "auto",
        trials_at_once: int | None = None,
    ) -> list[Reconstruction]:
        """Attack every observation from a claim that somebody supplies.

        From the truth, which only an auditor has, this finds what the information in the update
        and in the prior leaves of it: a ceiling for searches that end near the truth.

        Args:
            seen: observations that share a broadcast state.
            claims: one start per observation.
            engine: how trials run together; "auto" measures.
            trials_at_once: most trials that may step together; None leaves it to the engine.
        """
        objective = self.composed(seen)
        limit = Limit(trials_at_once or sys.maxsize)
        streams = tuple(torch.Generator().manual_seed(0) for _ in seen)
        targets = tuple(range(len(seen)))
        objective = replace(objective, targets=targets, limit=limit, streams=streams)
        start = _where_it_runs(objective, objective.unknown.encode(claims))
        objective = self._settled(objective, start, engine)
        return _choose(objective, self.refine(objective, start), len(seen))

    def settle_engine(
        self, seen: Sequence[Observation], *, trials_at_once: int | None = None
    ) -> Engine:
        """Measure which engine suits these observations, without attacking them."""
        objective = self.composed(seen)
        targets = tuple(i for i in range(len(seen)) for _ in range(self.restarts))
        limit = Limit(trials_at_once or sys.maxsize)
        objective = replace(objective, targets=targets, limit=limit)
        stream = torch.Generator().manual_seed(0)
        start = _where_it_runs(objective, self.starts(objective, [stream] * len(seen)))
        return self._settled(objective, start, "auto").engine

    def _settled(self, objective: Objective, start: Variables, engine: Engine) -> Objective:
        if self.one_by_one:
            engine = "loop"
        engine = calibrated(objective, start) if engine == "auto" else engine
        return replace(objective, engine=engine)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """The attack's own objective as a function of any claim (an auditor passes the truth)."""
        return self.composed([seen]).at

    def fit(self, seen: Observation) -> Callable[[Batch], float]:
        """The matching term of the objective alone: 0 at the truth of a noiseless update."""
        return replace(self.composed([seen]), penalties=()).at


def _where_it_runs(objective: Objective, start: Variables) -> Variables:
    """Starts, drawn on the CPU whatever the device, where the network is."""
    return {k: v.to(objective.fit.device) for k, v in start.items()}


def _choose(objective: Objective, found: Search, count: int) -> list[Reconstruction]:
    """Per target, the trial with the lowest objective."""
    inputs, labels = objective.unknown.decode(found.variables, objective.targets)
    low, high = objective.unknown.spec.bounds
    claims = []
    for target in range(count):
        trials = [t for t, owner in enumerate(objective.targets) if owner == target]
        dropped = {t for t in trials if found.status[t] == "dropped"}
        best = min(trials, key=lambda t: (float(found.values[t]), t in dropped))
        chosen = inputs[best].detach().clamp(low, high).cpu()
        batch = objective.unknown.claimed(chosen, labels[best].detach().cpu())
        claims.append(
            Reconstruction(
                batch=batch,
                objective=float(found.values[best]),
                status=found.status[best],
                message=found.notes.get(target) or _told(len(trials), len(dropped)),
                evaluations=sum(found.evaluations[t] for t in trials),
                history=tuple(found.history[best]),
                engine=str(objective.engine),
            )
        )
    return claims


def _told(restarts: int, dropped: int) -> str:
    if restarts == 1:
        return ""
    return f"best of {restarts} restarts" + (f", {dropped} dropped early" if dropped else "")
