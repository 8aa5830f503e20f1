"""The matched posterior, searched so that a miss says something about the protection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradleak.attacks.parts.annealing import Path, annealed
from gradleak.attacks.parts.known_labels import known_or_recovered
from gradleak.attacks.parts.langevin import posterior_mean
from gradleak.attacks.parts.likelihood import DataTerm, data_term, noise_variance
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import Penalty
from gradleak.attacks.parts.search import Search, adam
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.priors import TotalVariation
from gradleak.seeding import child, normal
from gradleak.types import About, Batch, Fact, Observation, Prior

_CLOSE = (0.01, 0.03, 0.1)
"""First steps of searches that begin near the end, one after the other, of the usual first step."""


@dataclass(frozen=True)
class Posterior(Recipe):
    """argmax p(u | x) p(x), the mean of that posterior, or the centre of its heaviest ball.

    An honest server who knows the protection, and has a prior from public data if granted one.

        starts: the prior's mean, then draws from the prior
        for t < steps: Adam step on −log p(u | x) − log p(x), for three quarters of them with wider
            noise, soft activations and a warm softmax (see parts/annealing.py)
        keep the start with the highest posterior; never anything closer to the truth

    Annealing lets the prior lead until the likelihood is sharp, shows on which side of its kink a
    unit should be, and keeps a network that is certain from hiding its gradient.

    Args:
        steps: gradient evaluations per start.
        learning_rate: Adam's first step, as a share of the box; falls to zero by a cosine.
        restarts: starts; the posterior chooses.
        halving: drop the worse half of the starts after …, 1/4 and 1/2 of the steps, by the
            objective that they share there.
        estimate: "map", the maximum; "mean", which minimises the expected squared error (Langevin
            chain from the maximum); "ball", the maximum averaged over a ball around the claim.
        radius: of the ball, root mean square per pixel, as a share of the box.
        chain: steps of the Langevin chain.
        points: points of the ball, half of them the others' antipodes.
        naive: start from noise and minimise the posterior as it is, as published attacks do: to
            compare with, not to audit by.
        total_variation: weight of the prior taken where none is granted, nats per unit of Σ |∂x|.
    """

    steps: int = 1200
    learning_rate: float = 0.05
    restarts: int = 2
    halving: bool = False
    estimate: Literal["map", "mean", "ball"] = "map"
    radius: float = 0.05
    chain: int = 4000
    points: int = 16
    naive: bool = False
    total_variation: float = 1.0

    about: ClassVar[About] = About(
        id="posterior",
        title="Matched posterior, annealed",
        paper="gradleak, this package; the adversary of Balunović et al., Bayesian Framework for "
        "Gradient Leakage, ICLR 2022",
        link="https://arxiv.org/abs/2111.04706",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="the protection's own",
        prior="the one granted, else total variation",
        deviations=(
            "annealing to a schedule of ours, starts at the prior's mean and draws, chosen by the "
            "posterior; no weight is tuned",
            "constants of the schedule were chosen on other networks than those reported",
        ),
    )
    dtype: ClassVar = torch.float32
    copies: ClassVar = 10
    budgets: ClassVar = {
        "quick": {"steps": 600, "restarts": 1},
        "thorough": {"steps": 2400, "restarts": 4},
    }

    def data_term(self, seen: Sequence[Observation]) -> DataTerm:
        """−log p(u | x)."""
        return data_term(seen, dtype=self.dtype)

    def compose(self, seen: Sequence[Observation]) -> Objective:
        term = self.data_term(seen)
        labels = torch.stack([known_or_recovered(o) for o in seen])
        priors = self._priors(seen)
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=labels,
                boxed=False,
                mean=0.5,
                std=0.25,
                dtype=self.dtype,
            ),
            fit=term.fit,
            fit_weight=term.weight,
            penalties=((1.0, _surprise(priors, labels)),),
        )

    def _priors(self, seen: Sequence[Observation]) -> list[Prior]:
        """What is believed of every target; one object wherever one prior was granted."""
        distinct = {id(o.knowledge.prior): o for o in seen}
        beliefs = {key: self._prior(o) for key, o in distinct.items()}
        return [beliefs[id(o.knowledge.prior)] for o in seen]

    def _prior(self, seen: Observation) -> Prior:
        if seen.knowledge.prior is not None:
            return seen.knowledge.prior.to(self.dtype)
        nothing = Batch(torch.empty(0, *seen.data.shape), torch.empty(0, dtype=torch.int64))
        return TotalVariation(weight=self.total_variation).fit(nothing, seen.data, seed=0)

    def starts(self, objective: Objective, generators: Sequence[torch.Generator]) -> Variables:
        """The prior's mean first; then draws from it, or noise where it cannot be drawn from."""
        start = super().starts(objective, generators)
        if self.naive:
            return start
        labels = objective.unknown.labels
        seen = objective.fit.seen
        for number, (generator, prior) in enumerate(zip(generators, self._priors(seen))):
            own = number * self.restarts
            known = objective.unknown.batch_size if labels is None else labels[number]
            start["inputs"][own] = prior.mean(known).to(start["inputs"])
            if not prior.proper:
                continue
            for restart in range(1, self.restarts):
                stream = child(generator, f"prior/{restart}")
                drawn = prior.sample(known, generator=stream)
                start["inputs"][own + restart] = drawn.to(start["inputs"])
        return start

    def search(self, objective: Objective, start: Variables) -> Search:
        path = None
        if not self.naive:
            path = annealed(objective, first=noise_variance(objective.fit.seen[0]))
        return self._estimated(objective, self._descend(objective, start, path))

    def refine(self, objective: Objective, start: Variables) -> Search:
        # Long steps cross kinks of a ReLU network and may never come back; short ones get nowhere.
        steps, spent = max(1, self.steps // len(_CLOSE)), [0] * len(start["inputs"])
        for share in _CLOSE:
            close = replace(self, learning_rate=share * self.learning_rate, steps=steps)
            found = close._descend(objective, start, None)
            start = found.variables
            spent = [s + e for s, e in zip(spent, found.evaluations, strict=True)]
        return self._estimated(objective, replace(found, evaluations=spent))

    def _descend(self, objective: Objective, start: Variables, path: Path | None) -> Search:
        low, high = objective.unknown.spec.bounds
        if self.estimate == "ball":
            radius = self.radius * (high - low)
            objective = _Blurred.of(objective, radius=radius, points=self.points)
        return adam(
            objective,
            start,
            steps=self.steps,
            learning_rate=self.learning_rate * (high - low),
            schedule=lambda step, steps: 0.5 * (1 + math.cos(math.pi * step / steps)),
            path=path,
            halving=self.cuts,
        )

    def _estimated(self, objective: Objective, found: Search) -> Search:
        if self.estimate != "mean":
            return found
        stream = torch.Generator().manual_seed(0)
        kept = [t for t, status in enumerate(found.status) if status != "dropped"]
        part = replace(objective, targets=tuple(objective.targets[t] for t in kept))
        rows = {k: v[kept] for k, v in found.variables.items()}
        means = posterior_mean(part, rows, steps=self.chain, generator=stream)
        variables = {
            k: v.index_copy(0, torch.tensor(kept).to(v.device), means[k])
            for k, v in found.variables.items()
        }
        spent = [e + self.chain * (t in kept) for t, e in enumerate(found.evaluations)]
        return replace(found, variables=variables, evaluations=spent)


def _surprise(priors: Sequence[Prior], labels: Tensor) -> Penalty:
    """−log p(x) in nats; one prior is shared by all targets wherever it is one object."""

    def penalty(inputs: Tensor, targets: Sequence[int]) -> Tensor:
        wanted = labels[list(targets)].to(inputs.device)
        if len({id(priors[t]) for t in targets}) == 1:
            return -priors[targets[0]].log_prob(inputs, wanted)
        rows = zip(inputs, wanted, targets, strict=True)
        return torch.cat([-priors[t].log_prob(x[None], y[None]) for x, y, t in rows])

    return penalty


@dataclass(frozen=True)
class _Blurred(Objective):
    """The mean of an objective over points spread evenly through the volume of a ball.

    By Jensen this bounds −log of the posterior mass of the ball (Balunović et al., 2022, Eq. 5).

    Attributes:
        offsets: (points, b, *shape).
    """

    offsets: Tensor = field(default_factory=lambda: torch.zeros(1))

    @classmethod
    def of(cls, objective: Objective, *, radius: float, points: int) -> _Blurred:
        """Blur an objective.

        Args:
            objective: of the ball's centre.
            radius: of the ball, root mean square per entry.
            points: Monte-Carlo points in antipodal pairs, the same throughout the search.
        """
        unknown = objective.unknown
        shape = (max(1, points // 2), unknown.batch_size, *unknown.spec.shape)
        half = uniform_in_ball(shape, radius=radius, generator=torch.Generator().manual_seed(0))
        offsets = torch.cat([half, -half])
        values = {f.name: getattr(objective, f.name) for f in fields(objective)}
        return cls(**values, offsets=offsets)

    def values(self, variables: Variables, targets: Sequence[int]) -> Tensor:
        centre = variables["inputs"]
        points = [variables | {"inputs": centre + offset.to(centre)} for offset in self.offsets]
        blurred = torch.stack([Objective.values(self, p, targets) for p in points])
        return blurred.mean(0)


def uniform_in_ball(shape: tuple[int, ...], *, radius: float, generator: torch.Generator) -> Tensor:
    """Points (shape[0], ...) uniform in the volume of the ball ‖x‖ ≤ radius · √d, float64."""
    points = normal(shape, generator=generator, dtype=torch.float64).flatten(1)
    d = points.shape[1]
    reach = torch.rand(len(points), 1, generator=generator, dtype=torch.float64) ** (1 / d)
    reach = reach * radius * math.sqrt(d) / torch.linalg.vector_norm(points, dim=1, keepdim=True)
    spread: Tensor = points * reach
    return spread.reshape(shape)
