"""GIDM+ without an oracle: image, noise and time of a client that trains a diffusion model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gradleak.attacks.closed_form.timesteps import recovered_times, time_inputs
from gradleak.attacks.parts.distances import relative_squares, relative_weights
from gradleak.attacks.parts.gauss_newton import MOST, gauss_newton, model_bytes
from gradleak.attacks.parts.known_noise import part
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.lifting import Lifted, lift, liftable
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Unknown, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.defenses import rebased, undefended
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import Denoising, Diffusing
from gradleak.priors import Denoiser
from gradleak.seeding import child, normal
from gradleak.types import About, Batch, Fact, ModelState, Observation

_LEVELS = 40
"""Noise levels among which an estimate's own is looked for."""


@dataclass(frozen=True)
class GIDMPlus(Recipe):
    """min over x, ε (and t) of Σ_l w_l ‖g_l(x, ε, t) − u_l‖², w_l ∝ ‖u_l‖^(−2β), by L-BFGS.

    An honest server that knows neither the noise nor the time of its client. The time is read off
    the gradients of layers that see nothing else (`closed_form.timesteps`), or is granted, or is
    searched for as softmax weights over all T, which mix embeddings and ᾱ differentiably. Image
    and noise are then varied together, from images of the prior, or noise, and ε ~ N(0, 1):

        t in closed form
        many candidates (x, ε) at once, until one explains the update alone (`parts.lifting`)
        L-BFGS on (x, ε) in float32; then in the units of a Gauss–Newton model, in float64; again
        with a diffusion prior: σ of the estimate by the prior's own ε̂; x ← E[x | x + σ n]; again

    Args:
        steps: accepted steps of L-BFGS per restart on images and noise alone, over all stages;
            after `candidates` the first half has residuals in place of noise, where the update is
            linear.
        models: turns that the steps are cut into, each followed by a Gauss–Newton model; 0 for
            none.
        restarts: independent starts; the objective chooses.
        candidates: of every image, that explain the update together at first: three single starts
            of four end in another basin. 0 for one alone, which other than squared errors, several
            visits of an image, and granted noise have, too.
        lifting: steps of L-BFGS on all candidates at most; the first that explains the update alone
            ends them.
        attempts: times that candidates begin anew, at most, while none explains the update alone.
        lifted_balance: β of these.
        times: how t is found where it is not granted.
        order: x and ε (and t) together, or x, then t, then ε in turns, as published.
        rough: share of the steps in float32, where there are no models.
        balance: β; 0 weighs the update's tensors alike, 1 each by its own length.
        denoised: how often a granted diffusion prior replaces the estimate by what it expects.
    """

    steps: int = 1000
    models: int = 4
    restarts: int = 1
    candidates: int = 16
    lifting: int = 800
    attempts: int = 2
    lifted_balance: float = 0.5
    times: Literal["closed-form", "relaxed"] = "closed-form"
    order: Literal["joint", "alternate"] = "joint"
    rough: float = 0.8
    balance: float = 0.0
    denoised: int = 2

    about: ClassVar[About] = About(
        id="gidm-plus",
        title="Image, noise and time together (GIDM+)",
        paper="Huang, Hong, Roos & Chen, GIDM: Gradient Inversion of Federated Diffusion Models, "
        "ARES 2025",
        link="https://arxiv.org/abs/2405.20380",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="Gaussian (squared L2), tensors weighted by their lengths",
        prior="none, or a denoising diffusion model",
        deviations=(
            "noise starts from N(0, 1); the published code starts from the true noise",
            "times in closed form, or by a differentiable mixture; the published code passes an "
            "argmax, which has no gradient",
            "image and noise together by L-BFGS; published: Adam in turns",
            "many candidates at first, whose gradients add up; published: one",
        ),
    )
    budgets: ClassVar = {
        "quick": {"steps": 500, "lifting": 400, "attempts": 1},
        "thorough": {"steps": 4000, "lifting": 3000, "candidates": 32, "attempts": 4},
    }

    @property
    def crowd(self) -> int:  # type: ignore[override]
        return max(1, self.candidates)

    def beside(self, coordinates: int) -> int:
        return max(map(model_bytes, (coordinates, 2 * coordinates))) if self.models else 0

    def __post_init__(self) -> None:
        if self.times not in ("closed-form", "relaxed"):
            raise InvalidInput(f"times={self.times}: expected closed-form or relaxed")
        if self.order not in ("joint", "alternate"):
            raise InvalidInput(f"order={self.order}: expected joint or alternate")
        if not 0 <= self.rough <= 1:
            raise InvalidInput(f"rough={self.rough}: expected a share in [0, 1]")
        if min(self.denoised, self.candidates) < 0 or min(self.lifting, self.attempts) < 1:
            raise InvalidInput(
                f"denoised={self.denoised}, candidates={self.candidates}, lifting={self.lifting}, "
                f"attempts={self.attempts}: expected at least 0, 0, 1 and 1"
            )

    @property
    def one_by_one(self) -> bool:  # type: ignore[override]
        return self.times == "relaxed"  # hooks in the network know one trial

    def compose(self, seen: Sequence[Observation]) -> Objective:
        first = seen[0]
        core = undefended(first.mechanism)
        if not isinstance(core, Diffusing):
            raise NotApplicable("gidm-plus: the client is not known to train a diffusion model")
        size = first.knowledge.batch_size or 1
        known = core.draws
        granted = None if known is None else known.times
        visits = core.visits(size)
        if visits > 1 and granted is None:
            raise NotApplicable(
                f"gidm-plus: {visits} visits of every image have a time each, in an order that "
                "nothing shows: expected granted timesteps"
            )
        relaxed = granted is None and self.times == "relaxed"
        if relaxed and not isinstance(core, Denoising):
            raise NotApplicable("gidm-plus: times=relaxed is for one step of training")
        choices: tuple[tuple[tuple[int, ...], ...], ...] = ()
        if granted is None and not relaxed:
            choices = tuple(tuple(recovered_times(o).assigned(size)) for o in seen)
        prior = first.knowledge.prior
        low, high = first.data.bounds
        centre = torch.full((size, *first.data.shape), (low + high) / 2)
        if prior is not None:
            centre = prior.mean(size)
        unknown = WithDraws(
            first.data,
            size,
            labels=torch.stack([_labels(o, size) for o in seen]),
            dtype=self.dtype,
            centre=centre.to(self.dtype),
            visits=visits,
            timesteps=core.timesteps,
            granted=granted,
            noise=None if known is None else known.noise,
            choices=choices,
            relaxed=relaxed,
        )
        believed = rebased(
            first.mechanism, carried=True, draws=None, mixed=unknown.planes if relaxed else 0
        )
        asked = [replace(o, mechanism=believed) for o in seen]
        if relaxed:
            state = _mixing(first.state, first.data.shape, core.timesteps)
            asked = [replace(o, exchanges=(replace(o.exchanges[-1], state=state),)) for o in asked]
        distance = partial(relative_squares, balance=self.balance)
        return Objective(unknown=unknown, fit=Matching(asked, distance, dtype=self.dtype))

    def starts(self, objective: Objective, generators: Sequence[torch.Generator]) -> Variables:
        found = super().starts(objective, generators)
        unknown = objective.unknown
        assert isinstance(unknown, WithDraws)
        if unknown.choices:
            rows = [
                torch.tensor(unknown.choices[target][restart % len(unknown.choices[target])])
                for target in range(len(generators))
                for restart in range(self.restarts)
            ]
            found["times"] = torch.stack(rows).to(unknown.dtype)[..., None]
        return found

    def search(self, objective: Objective, start: Variables) -> Search:
        if not self.candidates or self.order != "joint" or not {"noise", "times"} <= start.keys():
            return self._led(objective, start)
        if not all(liftable(seen) for seen in objective.fit.seen):
            return self._led(objective, start)
        start = {k: v.clone() for k, v in start.items()}
        spent = []
        for trial, target in enumerate(objective.targets):
            low, high = (_LIFTING * i / len(objective.targets) for i in (trial, trial + 1))
            found = self._begun(part(objective, low, high), target, trial, start["times"][trial])
            for name, value in (
                ("inputs", found.images),
                ("noise", found.noise[:, None]),
                ("times", found.times[:, None]),
            ):
                start[name][trial] = value
            spent.append(found.evaluations)
        rest = replace(self, steps=max(1, self.steps - self.steps // 2))
        led = rest._led(part(objective, _LIFTING, 1), start)
        return replace(
            led, evaluations=[a + b for a, b in zip(led.evaluations, spent, strict=True)]
        )

    def _begun(self, objective: Objective, target: int, trial: int, times: Tensor) -> Lifted:
        """Where one trial's search begins: the best attempt, the first that is not stuck."""
        tried: list[Lifted] = []
        for attempt in range(self.attempts):
            name = f"candidates/{trial}" + (f"/{attempt}" if attempt else "")
            share = ((attempt + i) / self.attempts for i in (0, 1))
            tried.append(self._lifted(part(objective, *share), target, name, times))
            if not tried[-1].stuck:
                break
        best = min(tried, key=lambda found: found.value)
        return replace(best, evaluations=sum(found.evaluations for found in tried))

    def _lifted(self, objective: Objective, target: int, name: str, times: Tensor) -> Lifted:
        """Where one trial's search begins, by many candidates, drawn from the stream so named."""
        unknown, seen = objective.unknown, objective.fit.seen[target]
        stream = child(objective.streams[target], name)
        count = unknown.batch_size * self.candidates
        prior = seen.knowledge.prior
        low, high = unknown.spec.bounds
        if prior is not None:
            images = prior.sample(count, generator=child(stream, "images"))
        else:
            drawn = normal(
                (count, *unknown.spec.shape), generator=child(stream, "images"), dtype=torch.float32
            )
            images = (low + high) / 2 + (high - low) / 4 * drawn
        return lift(
            seen,
            images.view(unknown.batch_size, self.candidates, *unknown.spec.shape),
            times[:, 0].long(),
            noise=None,
            generator=child(stream, "noise"),
            steps=self.lifting,
            alone=self.steps // 2,
            balance=self.lifted_balance,
            progress=objective.progress,
        )

    @staticmethod
    def _single(objective: Objective) -> Objective:
        """The same in float32."""
        return replace(
            objective,
            unknown=replace(objective.unknown, dtype=torch.float32),
            fit=Matching(objective.fit.seen, objective.fit.distance, dtype=torch.float32),
            progress=lambda share: None,
        )

    def _led(self, objective: Objective, start: Variables) -> Search:
        prior = objective.fit.seen[0].knowledge.prior
        rounds = self.denoised if isinstance(prior, Denoiser) else 0
        share = max(1, self.steps // (rounds + 1))
        found = self._searched(objective, start, share, 0, rounds + 1)
        for number in range(rounds):
            assert isinstance(prior, Denoiser)
            better = denoised(prior, found.variables["inputs"], objective.unknown)
            if better is None:
                break
            moved = _with_image(objective, found.variables, better)
            last = number + 1 == rounds
            again = self._searched(objective, moved, share, number + 1, rounds + 1)
            found = _then(found, again)
            if last:
                ending = denoised(prior, found.variables["inputs"], objective.unknown)
                if ending is not None:
                    found.variables = _with_image(objective, found.variables, ending)
        return found

    def _searched(
        self, objective: Objective, start: Variables, steps: int, stage: int, stages: int
    ) -> Search:
        """L-BFGS in float32 and a Gauss–Newton model in float64, in turns, from `start`."""
        free = [k for k in ("inputs", "noise") if k in start]
        unknowns = sum(start[k][0].numel() for k in free)
        fits = self.order == "joint" and "logits" not in start and unknowns <= MOST
        turns = self.models if fits else 0
        rough = 1.0 if turns else self.rough
        each = max(1, round(rough * steps / max(1, turns)))
        found: Search | None = None
        for turn in range(max(1, turns)):
            share = (stage + turn / max(1, turns)) / stages
            objective.progress(share)
            after = self._descend(self._single(objective), _floats(start), each)
            found = after if found is None else _then(found, after)
            start = {k: v.to(objective.fit.dtype) for k, v in found.variables.items()}
            quiet = replace(objective, progress=lambda share: None)
            if turns and float(found.values.min()) <= _NEAR:
                weights = partial(relative_weights, balance=self.balance)
                fine = gauss_newton(quiet, start, weights=weights, free=free, solved=_SOLVED)
                found = _then(found, fine)
                start = found.variables
                if float(found.values.max()) <= _SOLVED:
                    break
        assert found is not None
        if not turns and rough < 1:
            fine = self._descend(objective, start, steps - round(rough * steps))
            found = _then(found, fine)
        return found

    def _descend(self, objective: Objective, start: Variables, steps: int) -> Search:
        if self.order == "joint":
            return lbfgs(objective, start, steps=steps)
        found: Search | None = None
        turns = [name for name in ("inputs", "logits", "noise") if name in start]
        each = max(1, steps // (_TURNS * len(turns)))
        for turn in range(max(1, steps // each)):
            free = replace(objective.unknown, free=(turns[turn % len(turns)],))  # type: ignore[call-arg]
            after = lbfgs(replace(objective, unknown=free), start, steps=each)
            found = after if found is None else _then(found, after)
            start = found.variables
        assert found is not None
        return found

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """A claim of images alone leaves noise and time open: nan everywhere."""
        self.compose([seen])
        return lambda batch: math.nan

    fit = objective


_LIFTING = 0.6
"""Share of the work that candidates have."""
_NEAR = 1e-6
"""Objective below which a model of the curvature helps; further off it leads astray."""
_SOLVED = 1e-18
"""Objective at which a search ends."""
_TURNS = 20
"""Turns of every unknown, where they take turns."""


@dataclass(frozen=True)
class WithDraws(Unknown):
    """Images, and the noise and the time of every visit of them.

    Attributes:
        centre: (b, *shape), where images start.
        visits: of every image.
        timesteps: T.
        granted: times (b, visits), or None.
        noise: granted noise (b, visits, *shape), or None.
        choices: per target, the ways to share the times found among the images.
        relaxed: whether times are searched for, as softmax weights.
        free: variables that move; none named are all.
    """

    centre: Tensor
    visits: int
    timesteps: int
    granted: Tensor | None
    noise: Tensor | None
    choices: tuple[tuple[tuple[int, ...], ...], ...]
    relaxed: bool
    free: tuple[str, ...] = field(default=())

    @property
    def planes(self) -> int:
        """Planes that hold a share of every time."""
        return math.ceil(self.timesteps / math.prod(self.spec.shape[1:]))

    def start(self, generator: torch.Generator, *, restarts: int) -> Variables:
        b, shape = self.batch_size, self.spec.shape
        streams = [child(generator, f"start/{restart}") for restart in range(restarts)]
        size = (b, self.visits, *shape)
        noise = [normal(size, generator=child(s, "noise"), dtype=self.dtype) for s in streams]
        found = {"inputs": self.centre.to(self.dtype).expand(restarts, b, *shape).clone()}
        if b > 1:  # equal starts of equal images would stay equal
            found["inputs"] += 0.05 * torch.stack(
                [
                    normal((b, *shape), generator=child(s, "images"), dtype=self.dtype)
                    for s in streams
                ]
            )
        if self.noise is None:
            found["noise"] = torch.stack(noise)
        if self.relaxed:
            found["logits"] = torch.stack(
                [
                    normal((b, self.timesteps), generator=child(s, "times"), dtype=self.dtype)
                    for s in streams
                ]
            )
        elif self.granted is not None:
            known = self.granted.to(self.dtype)
            found["times"] = known.expand(restarts, *known.shape).clone()
        return found

    def encode(self, claims: Sequence[Batch]) -> Variables:
        stream = torch.Generator().manual_seed(0)
        found = self.start(stream, restarts=len(claims))
        found["inputs"] = torch.stack([c.inputs for c in claims]).to(self.dtype)
        if self.choices:
            rows = [torch.tensor(ways[0]) for ways in self.choices]
            found["times"] = torch.stack(rows).to(self.dtype)[..., None]
        return found

    def decode(self, variables: Variables, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
        held = {
            k: v if (k in self.free if self.free else k != "times") else v.detach()
            for k, v in variables.items()
        }
        images = held["inputs"]
        count, b, *shape = images.shape
        noise = held.get("noise")
        if noise is None:
            assert self.noise is not None
            noise = self.noise.to(images).expand(count, *self.noise.shape)
        if self.relaxed:
            shares = held["logits"].softmax(-1)
            room = self.planes * math.prod(shape[1:])
            padded = torch.nn.functional.pad(shares, (0, room - self.timesteps))
            behind = torch.cat([noise[:, :, 0], padded.view(count, b, -1, *shape[1:])], 2)
        else:
            planes = held["times"][..., None, None, None]
            planes = planes.expand(count, b, self.visits, 1, *shape[1:])
            behind = torch.cat([noise, planes.to(noise)], 3).flatten(2, 3)
        assert self.labels is not None
        return torch.cat([images, behind], 2), self.labels[list(targets)].to(images.device)

    def claimed(self, inputs: Tensor, labels: Tensor) -> Batch:
        return Batch(inputs[:, : self.spec.shape[0]], labels)


def denoised(prior: Denoiser, images: Tensor, unknown: Unknown) -> Tensor | None:
    """E[x | x + σ n = images] with σ read off each image, or None where no image has noise.

    σ is the least at which the prior finds no more noise than there would be: mean ε̂² ≤ 1.

    Args:
        prior: of such images.
        images: (trials, b, *shape), perhaps outside their bounds.
        unknown: whose form they have.
    """
    flat = prior.scaled(images.flatten(0, 1).float())
    schedule = prior.schedule
    sigmas = ((1 - schedule.alphas) / schedule.alphas).sqrt()
    wanted = torch.logspace(
        math.log10(float(sigmas[0])), math.log10(float(sigmas[-1])), _LEVELS, dtype=torch.float64
    )
    nearest = torch.searchsorted(sigmas, wanted).clamp(max=schedule.timesteps - 1)
    grid = torch.tensor(sorted(set(nearest.tolist())))
    found, changed = flat.clone(), False
    with torch.no_grad():
        for i, image in enumerate(flat):
            alpha = schedule.alphas[grid].float().view(-1, 1, 1, 1)
            noised = alpha.sqrt() * image
            output = prior.output(noised, grid)
            noise = schedule.noise(noised, output, grid)
            fits = (noise.square().flatten(1).mean(1) <= 1).nonzero().flatten()
            level = int(fits[0]) if len(fits) else len(grid) - 1
            if level == 0:
                continue
            changed = True
            chosen = schedule.clean(noised, output, grid)[level]
            found[i] = chosen.clamp(-1, 1)
    if not changed:
        return None
    return prior.unscaled(found).view_as(images).to(images)


def _with_image(objective: Objective, variables: Variables, images: Tensor) -> Variables:
    """Other images, and the noise that leaves x_t as it was."""
    unknown = objective.unknown
    assert isinstance(unknown, WithDraws)
    moved = dict(variables) | {"inputs": images}
    core = undefended(objective.fit.mechanism)
    assert isinstance(core, Diffusing)
    if "noise" not in variables or "times" not in variables:
        return moved
    low, high = unknown.spec.bounds
    alpha = core.noise_schedule.alphas[variables["times"].long()].to(images)
    alpha = alpha[..., None, None, None]
    change = (variables["inputs"] - images)[:, :, None] * (2 / (high - low))
    moved["noise"] = variables["noise"] + (alpha / (1 - alpha)).sqrt() * change
    return moved


def _floats(variables: Variables) -> Variables:
    return {k: v.float() for k, v in variables.items()}


def _then(first: Search, second: Search) -> Search:
    """A search that another one went on from."""
    return Search(
        second.variables,
        second.values,
        second.status,
        [a + b for a, b in zip(first.evaluations, second.evaluations, strict=True)],
        [a + b for a, b in zip(first.history, second.history, strict=True)],
    )


def _labels(seen: Observation, size: int) -> Tensor:
    known = seen.knowledge.labels
    return torch.zeros(size, dtype=torch.int64) if known is None else known


class _Mixture:
    """Hooks that turn a network of times into one of shares (b, T) over all times."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.shares: Tensor | None = None

    def enter(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        noised, times, *rest = given
        if times.ndim != 2:
            self.shares = None
            return given
        self.shares = times
        return (noised, times.new_zeros(len(times)), *rest)

    def embed(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.shares is None:
            return None
        return (self.shares @ self.table.to(self.shares),)


def _mixing(state: ModelState, shape: tuple[int, ...], timesteps: int) -> ModelState:
    """The same state of a network that takes shares of times: it mixes their embeddings."""
    layers = time_inputs(state, shape, timesteps)
    if not layers:
        raise NotApplicable("gidm-plus: no layer of the network sees the time alone")
    name, table = next(iter(layers.items()))
    model = copy.deepcopy(state.model)
    mixture = _Mixture(table)
    model.register_forward_pre_hook(mixture.enter)
    model.get_submodule(name).register_forward_pre_hook(mixture.embed)
    return replace(state, model=model)
