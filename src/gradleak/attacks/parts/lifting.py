"""Many candidates explain an update together, until one of them does so alone.

    u = ∂/∂θ (1/n) Σ_i ‖f_θ(x_i) − v_i‖²  =  (2/n) Σ_i J(x_i)ᵀ r_i,   J = ∂f_θ/∂θ,  r = f_θ(x) − v

The update of a client that denoises is linear in the residuals r and a sum over noisy images x,
and nothing says how many these are. A search for the one pair (x, r) that was there ends in another
basin more often than not. Lifted to P pairs per image whose gradients add up, the squared distance
is convex in their distribution, and with enough of them descent is not trapped (Chizat & Bach,
NeurIPS 2018, for sums of features): most candidates fade, and the mass moves to where the image is.
What is left of it then explains the update alone, which the objective shows, without the truth.

Source: gradleak; found for this project and not known to be published.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from gradleak.attacks.parts.client import loaded
from gradleak.attacks.parts.distances import relative_squares, relative_weights
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Unknown, Variables
from gradleak.defenses import rebased, undefended
from gradleak.denoising import Schedule
from gradleak.mechanisms import Denoising, DenoisingAvg, Diffusing
from gradleak.mechanisms.client import template
from gradleak.seeding import normal
from gradleak.types import Batch, Observation

_UNIT = 1.5
"""Residual that weighs as much as one unit of a noisy image, before P candidates share it."""
_GAP = 0.1
"""Share of the update that a few candidates may leave unexplained to be tried alone."""
_ALONE = 60
"""Steps of such a trial."""
_SETTLED = 3e-3
"""Objective of a trial that ends the search, beside noise, in units of the faintest image's share
of the update: so far down, only one basin leads."""
FORGIVEN = 1.05
"""Noise of the client that an objective is forgiven, over what such noise is expected to leave."""
_ROUNDING = 1e-13
"""Objective that float32 ends at."""
_ALIKE = 0.5
"""Cosine between two candidates, without their mean, from which they are one image."""
_HISTORY, _COORDINATES = (20, 100), 4_000_000


@dataclass(frozen=True)
class Lifted:
    """What a client may have computed on.

    Attributes:
        images: (b, *shape), in the data's bounds as far as the search kept to them.
        noise: (b, *shape).
        times: (b,) int64.
        value: objective of these alone.
        stuck: whether these alone leave more than a share of the update unexplained that only
            another basin does.
        evaluations: gradients taken, of all candidates together or of a few alone.
    """

    images: Tensor
    noise: Tensor
    times: Tensor
    value: float
    stuck: bool
    evaluations: int


def liftable(seen: Observation) -> bool:
    """Whether a client's update is one gradient of a squared error of denoising."""
    core, size = undefended(seen.mechanism), seen.knowledge.batch_size or 1
    steps = core.local_steps(size) if isinstance(core, DenoisingAvg) else 1
    squared = isinstance(core, Diffusing) and core.loss is torch.nn.functional.mse_loss
    return squared and steps == 1


def lift(
    seen: Observation,
    images: Tensor,
    times: Tensor,
    *,
    noise: Tensor | None,
    generator: torch.Generator,
    steps: int,
    alone: int,
    balance: float,
    progress: Callable[[float], None] = lambda share: None,
) -> Lifted:
    """Search for a batch through many candidates of every image.

    Args:
        seen: an update of a client that is `liftable`.
        images: (b, P, *shape), where the candidates of every image start.
        times: (b,) of the images; where times repeat, how often is found anew.
        noise: (b, *shape), where it is known; candidates are images then, not noisy ones.
        generator: of the candidates' noise, where it is not.
        steps: of L-BFGS at most.
        alone: steps of L-BFGS that follow, on what explained the update best.
        balance: tensors weigh ‖u‖^(−2 · balance).
        progress: told the share of the steps made.
    """
    b, each = images.shape[:2]
    whole = {"minibatch_size": None, "fixed_order": None}  # one step, as `liftable` has it
    freed = rebased(seen.mechanism, carried=True, freed=True, draws=None, **whole)
    fit = Matching(
        [replace(seen, mechanism=freed)],
        partial(relative_squares, balance=balance),
        dtype=torch.float32,
    )
    device = fit.device
    images, times = images.to(device), times.to(device)
    owners = torch.arange(b, device=device).repeat_interleave(each)
    network = loaded(template(fit.state.model, "eval"), fit.state, trained=False)
    candidates = Candidates(
        seen.data,
        b * each,
        labels=None,
        dtype=torch.float32,
        schedule=_core(fit).noise_schedule,
        network=network,
        times=times[owners],
        noise=None if noise is None else noise.to(device)[owners].float(),
        unit=_UNIT,
        bounds=_core(fit).bounds,
    )
    start = candidates.placed(images.flatten(0, 1).float(), generator)
    objective = Objective(unknown=candidates, fit=fit, progress=progress)
    groups = owners if noise is not None else torch.unique(times, return_inverse=True)[1][owners]
    inputs, labels = candidates.decode(start, ())
    floor = fit.noise(Batch(inputs[0], labels[0]), 0, generator=generator)
    trials = _Trials(objective, groups, b, min(_ALONE, steps), balance, floor)
    size = start["residual"].numel()
    least, most = _HISTORY
    found = lbfgs(
        objective,
        start,
        steps=steps,
        history=max(least, min(most, _COORDINATES // size)),
        watch=trials.watch,
    )
    if not trials.settled:
        trials.attempt(found, gap=math.inf)
    assert trials.best is not None
    best = trials.best.unknown
    assert isinstance(best, Candidates)
    ended = lbfgs(trials.best, trials.found.variables, steps=alone, solved=[_ROUNDING])
    clean, drawn = best.drawn(ended.variables)
    value = float(ended.values[0])
    low, high = best.bounds
    return Lifted(
        images=low + (clean + 1) * ((high - low) / 2),
        noise=drawn,
        times=best.times,
        value=value,
        stuck=not value <= _SETTLED + FORGIVEN * floor,
        evaluations=found.evaluations[0] + trials.evaluations + ended.evaluations[0],
    )


@dataclass(frozen=True)
class Candidates(Unknown):
    """Noisy images and residuals (trials, P, *shape), as `noised` and `residual`.

    Where the noise is known, `images` in [−1, 1] stand for the noisy ones.

    Attributes:
        schedule: of the noise.
        network: what the client trains.
        times: (P,) int64.
        noise: (P, *shape), or None.
        unit: of the residuals.
        bounds: that the client scales to [−1, 1].
    """

    schedule: Schedule
    network: Callable[[Tensor, Tensor], Tensor]
    times: Tensor
    noise: Tensor | None
    unit: float
    bounds: tuple[float, float]

    def placed(self, images: Tensor, generator: torch.Generator) -> Variables:
        """Variables of one trial at images (P, *shape) as clients hold them, freshly noised."""
        low, high = self.bounds
        clean = (images - low) * (2 / (high - low)) - 1
        noise = self.noise
        if noise is None:
            drawn = normal(clean.shape, generator=generator, dtype=torch.float32)
            noise = drawn.to(clean.device)
        noised = self.schedule.noised(clean, noise, self.times)
        residual = self._output(noised) - self.schedule.target(clean, noise, self.times)
        first = {"noised": noised} if self.noise is None else {"images": clean}
        return {k: v[None] for k, v in (first | {"residual": residual / self.unit}).items()}

    def noised(self, variables: Variables) -> Tensor:
        """x_t of every candidate, (trials, P, *shape)."""
        if self.noise is None:
            return variables["noised"]
        images = variables["images"]
        flat = self.schedule.noised(
            images.flatten(0, 1), self.noise.repeat(len(images), *[1] * (images.ndim - 2)),
            self.times.repeat(len(images)),
        )  # fmt: skip
        return flat.view_as(images)

    def decode(self, variables: Variables, targets: object) -> tuple[Tensor, Tensor]:
        noised = self.noised(variables)
        planes = self.times.to(noised).view(1, -1, *[1] * (noised.ndim - 2))
        planes = planes.expand(*noised.shape[:2], 1, *noised.shape[3:])
        inputs = torch.cat([noised, variables["residual"] * self.unit, planes], 2)
        return inputs, torch.zeros(inputs.shape[:2], dtype=torch.int64, device=inputs.device)

    def few(self, variables: Variables, chosen: Tensor) -> tuple[Candidates, Variables]:
        """Some candidates alone, with their share of the update."""
        share = len(chosen) / self.batch_size
        own = {k: v[:, chosen].clone() for k, v in variables.items()}
        own["residual"] *= share
        noise = None if self.noise is None else self.noise[chosen]
        some = replace(self, batch_size=len(chosen), times=self.times[chosen], noise=noise)
        return some, own

    def drawn(self, variables: Variables) -> tuple[Tensor, Tensor]:
        """x_0 in [−1, 1] and ε of a trial's candidates, (P, *shape) each."""
        noised = self.noised(variables)[0]
        if self.noise is not None:
            return variables["images"][0], self.noise
        target = self._output(noised) - variables["residual"][0] * self.unit
        schedule = self.schedule
        return schedule.clean(noised, target, self.times), schedule.noise(
            noised, target, self.times
        )

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        low, high = self.spec.bounds
        middle = torch.full((self.batch_size, *self.spec.shape), (low + high) / 2)
        drawn = [self.placed(middle, generator) for _ in range(restarts)]
        return {k: torch.cat([d[k] for d in drawn]) for k in drawn[0]}

    def encode(self, claims: Sequence[Batch]) -> Variables:
        stream = torch.Generator().manual_seed(0)
        drawn = [self.placed(c.inputs.float(), stream) for c in claims]
        return {k: torch.cat([d[k] for d in drawn]) for k in drawn[0]}

    def _output(self, noised: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network(noised, self.times)


@dataclass
class _Trials:
    """Tries the strongest candidates alone, and keeps what explained the update best."""

    objective: Objective
    groups: Tensor
    size: int
    steps: int
    balance: float
    floor: float
    best: Objective | None = None
    found: Search = field(init=False)
    faintest: float = 1.0
    evaluations: int = 0

    @property
    def settled(self) -> bool:
        return self.best is not None and float(self.found.values[0]) <= (
            _SETTLED * self.faintest + FORGIVEN * self.floor
        )

    def watch(self, ahead: Search) -> bool:
        self.attempt(ahead, gap=_GAP + self.floor)
        return self.settled

    def attempt(self, ahead: Search, *, gap: float) -> None:
        """Let the strongest go on alone, if they leave no more than `gap` unexplained."""
        whole = self.objective.unknown
        assert isinstance(whole, Candidates)
        gradients = self._gradients(whole, ahead.variables)
        own = gradients.new_zeros(int(self.groups.max()) + 1, gradients.shape[1])
        squares = own.index_add(0, self.groups, gradients).square().sum(1)
        self.faintest = float((squares / squares.sum()).min().nan_to_num(1.0))
        noised = whole.noised(ahead.variables)[0].flatten(1)
        chosen = _strongest(gradients.norm(dim=1), noised, self.groups, self.size)
        alone, at = whole.few(ahead.variables, chosen)
        fit, weights = self.objective.fit, self._weights
        received = torch.cat([(fit.received[0][k] * w).flatten() for k, w in weights.items()])
        together = gradients[chosen].sum(0)
        inner, square = float(together @ received), float(together @ together)
        total = float(received @ received)
        explained = inner**2 / (square * total) if square * total > 0 else math.nan
        if explained < 1 - gap:
            return
        if math.isfinite(explained):
            # The gradient of a mean over P candidates holds 1/P of each.
            at["residual"] *= inner / square * whole.batch_size
        trial = replace(self.objective, unknown=alone, progress=lambda share: None)
        found = lbfgs(trial, at, steps=self.steps)
        self.evaluations += found.evaluations[0]
        if self.best is None or float(found.values[0]) < float(self.found.values[0]):
            self.best, self.found = trial, found

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """Square roots of the weights of the compared tensors."""
        fit = self.objective.fit
        received = {k: fit.received[0][k] for k in fit.compared}
        weights = relative_weights(received, balance=self.balance)
        return {k: w.sqrt() for k, w in weights.items()}

    def _gradients(self, whole: Candidates, variables: Variables) -> Tensor:
        """Weighted gradient of every candidate alone, (P, coordinates)."""
        fit, weights = self.objective.fit, self._weights
        inputs, labels = whole.decode(variables, ())
        core, rows = _core(fit), []
        for image, label in zip(inputs[0], labels[0], strict=True):
            one = core.gradient(fit.state, fit.state.params, Batch(image[None], label[None]))
            rows.append(torch.cat([(one[k] * w).flatten() for k, w in weights.items()]))
        return torch.stack(rows)


def _strongest(weights: Tensor, noised: Tensor, groups: Tensor, size: int) -> Tensor:
    """Indices of `size` candidates, by weight: every group's first, and then whatever is left.

    Candidates that are one image with a stronger one of their group come last.

    Args:
        weights: (P,).
        noised: (P, coordinates).
        groups: (P,) int64.
        size: b.
    """
    order = weights.argsort(descending=True).tolist()
    centred = torch.nn.functional.normalize(noised - noised.mean(0), dim=1)
    first: dict[int, int] = {}
    for index in order:
        first.setdefault(int(groups[index]), index)
    chosen = list(first.values())
    twins = []
    for index in order:
        if len(chosen) == size:
            break
        rivals = [i for i in chosen if groups[i] == groups[index]]
        if index in chosen:
            continue
        if float((centred[rivals] @ centred[index]).max()) > _ALIKE:
            twins.append(index)
        else:
            chosen.append(index)
    return torch.tensor(sorted((chosen + twins)[:size]), device=noised.device)


def _core(fit: Matching) -> Denoising | DenoisingAvg:
    core = undefended(fit.mechanism)
    assert isinstance(core, Denoising | DenoisingAvg)
    return core
