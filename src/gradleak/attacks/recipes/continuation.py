"""Continuation: attack a smooth copy of the network, and let it become the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradleak.attacks.closed_form.disaggregate import disaggregate
from gradleak.attacks.closed_form.peel import (
    Activations,
    Place,
    at_head,
    head_place,
    peel,
    places,
)
from gradleak.attacks.closed_form.row_space import row_space
from gradleak.attacks.parts import smoothing
from gradleak.attacks.parts.client import plain_client
from gradleak.attacks.parts.distances import balanced_gap, direction_gap
from gradleak.attacks.parts.known_labels import labels_to_match
from gradleak.attacks.parts.lbfgs import lbfgs
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Objective
from gradleak.attacks.parts.penalties import Penalty, squared_variation
from gradleak.attacks.parts.search import Search
from gradleak.attacks.parts.unknowns import Images, Variables
from gradleak.attacks.recipe import Recipe
from gradleak.mechanisms import FedSGD
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import About, Fact, ModelState, Observation, Status

Stage = Callable[[Objective], Objective]

_KNOWN, _SPAN, _WHOLE = 0.05, 0.2, 0.5
"""Steps of every search on a network without kinks, as shares of those of a path."""


@dataclass(frozen=True)
class Continuation(Recipe):
    """min over x of 1 − cos(∇ℓ(f(x), y), u), along a path of networks f_β that ends at f.

    Matching through kinks stalls in poor minima; matching through smooth activations does not. An
    honest server therefore smooths its own copy of the network, finds the image that explains the
    update there, and follows it while the copy sharpens into the network that the client ran.

        x ~ N(centre of the box, a twentieth of its width)
        for β = 4, 8, 16, ...: L-BFGS on ½‖g_β/‖g_β‖ − u/‖u‖‖² + c/β² · mean |∂x|²
        keep the stage that the network itself, without smoothing, explains best

    g_β is the gradient through log(1 + exp(s a))/s in place of relu(a), s = β over the spread of a.
    Where the head's gradient separates into its examples, layers below it are peeled off as far as
    the update determines them, and each x_i has to reproduce its own activations at the deepest
    place known.

    A network without kinks needs no path and no prior, but three searches: what is known at the
    head, as far as rounding left it; the update and Σ ‖h_i − its projection on the row space of
    the head's gradient‖², where the inputs h_i of the head lie whatever the rounding; the update.
    There the distance weighs the gap of every tensor by the inverse of its length.

    Args:
        steps: accepted L-BFGS steps per restart, over all stages; 1 + log₂ b times as many for a
            batch of b.
        stages: number of β.
        smoothest: the first β.
        variation: c.
        restarts: independent starts; the objective chooses.
        tolerance: a network without kinks is solved at objective ≤ tolerance; an update rounded
            to single precision leaves about 6e-16.
    """

    steps: int = 1200
    stages: int = 8
    smoothest: float = 4.0
    variation: float = 10.0
    restarts: int = 1
    tolerance: float = 1e-15

    about: ClassVar[About] = About(
        id="continuation",
        title="Activation continuation",
        paper="gradleak, this package; matching as in Geiping et al., Inverting Gradients: How "
        "Easy Is It to Break Privacy in Federated Learning?, NeurIPS 2020",
        link="https://arxiv.org/abs/2003.14053",
        modalities=frozenset({"image"}),
        classifiers=True,
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="of directions (cosine), through smoothed networks",
        prior="squared variation that fades",
        deviations=(
            "the path of smooth networks is ours; no paper is reproduced",
            "spreads of activations come from random fields with the spectrum of photographs, "
            "since an attack sees the observation alone and no public image",
            "constants were chosen on photographs and on a smaller network than those reported",
            "labels that are not granted come from the separated head, else from iDLG (one "
            "example) or sign counts",
            "the claim is clamped into the data's bounds at the end and scored there",
        ),
    )
    budgets: ClassVar = {"quick": {"steps": 480}, "thorough": {"steps": 2400, "restarts": 2}}

    def compose(self, seen: Sequence[Observation]) -> Objective:
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=labels_to_match(seen),
                boxed=False,
                mean=0.5,
                std=0.05,
                dtype=self.dtype,
            ),
            fit=Matching(seen, direction_gap, dtype=self.dtype),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        network = smoothing.swapped(objective.fit.state.model)
        smoothing.measure(network, objective.fit.state, objective.unknown.spec)
        head, chain = head_place(network), places(network)
        smooth = not smoothing.kinked(network)
        if smooth:
            objective = replace(objective, fit=objective.fit.comparing(balanced_gap))
        known = [_known(o, head, chain, smooth=smooth) for o in objective.fit.seen]
        groups: dict[object, list[int]] = {}
        for trial, target in enumerate(objective.targets):
            groups.setdefault(known[target].kind, []).append(trial)
        parts = []
        for trials in groups.values():
            part = replace(objective, targets=tuple(objective.targets[t] for t in trials))
            stages = self._stages(network, head, known, known[part.targets[0]])
            parts.append((trials, self._follow(stages, part, _rows(start, trials))))
        return _joined(parts, start)

    def _stages(
        self, network: nn.Module, head: Place | None, known: Sequence[_Known], like: _Known
    ) -> list[tuple[float, Stage]]:
        """Objectives to minimise in turn and their shares of the steps, for targets like one."""
        alike = [k if k.kind == like.kind else _Known() for k in known]
        path = _Path(network, self.variation)
        if like.place is not None:
            here = [k.activations for k in alike]
            path = _KnownPath(like.place.below, self.variation, like.place.rectified, here)
        if smoothing.kinked(network):
            share, sharpness = 1 / self.stages, [2**k for k in range(self.stages)]
            return [(share, partial(path.at, self.smoothest * s)) for s in sharpness]
        stages: list[tuple[float, Stage]] = [(_WHOLE, lambda objective: objective)]
        if head is not None and like.rows is not None:
            stages.insert(0, (_SPAN, _Span(head.below, [k.rows for k in alike])))
        if like.place is not None:
            stages.insert(0, (_KNOWN, partial(path.at, math.inf)))
        return stages

    def _follow(
        self, stages: Sequence[tuple[float, Stage]], objective: Objective, start: Variables
    ) -> Search:
        """L-BFGS on every stage in turn; per trial, the end that the network explains best."""
        steps = self.steps * (1 + math.log2(objective.unknown.batch_size))
        solved = [self.tolerance] * len(objective.fit.received)
        best = last = Search(start, torch.full((len(objective.targets),), math.inf), [], [])
        whole, before = sum(share for share, _ in stages), 0.0
        for share, stage in stages:

            def told(done: float, before: float = before, share: float = share) -> None:
                objective.progress((before + done * share) / whole)

            wanted = stage(replace(objective, progress=told))
            last = lbfgs(wanted, last.variables, steps=max(1, round(steps * share)), solved=solved)
            best = _better(best, _in_the_box(last, objective))
            before += share
        return best


@dataclass(frozen=True)
class _Path:
    """The objectives of the smooth networks: whole update, and variation fading as β grows."""

    network: nn.Module
    variation: float

    def at(self, beta: float, objective: Objective) -> Objective:
        state = replace(objective.fit.state, model=smoothing.at_beta(self.network, beta))
        return replace(
            objective,
            fit=objective.fit.through(state),
            penalties=((self.variation / beta**2, squared_variation),),
        )


@dataclass(frozen=True)
class _KnownPath(_Path):
    """The same up to a place whose activations and errors are known example by example.

    Here `network` ends at that place, before its ReLU if it has one. The client's gradient below
    is that of the inner product of the network's outputs with the known cotangents.
    """

    rectified: bool
    known: Sequence[Activations | None]

    def at(self, beta: float, objective: Objective) -> Objective:
        model, whole = smoothing.at_beta(self.network, beta), objective.fit.state
        state = ModelState(model, _own_params(model, whole), whole.buffers)
        believed = plain_client(objective.fit.mechanism)
        mode = "eval" if believed is None else believed.batch_norm
        client = FedSGD(batch_norm=mode, loss=_inner_product)
        like = next(iter(whole.params.values()))
        blank = torch.zeros_like(next(k for k in self.known if k is not None).features)
        wanted = torch.stack([(blank if k is None else k.features).to(like) for k in self.known])
        cotangents = [(blank if k is None else k.cotangents).to(like) for k in self.known]
        spec = objective.unknown.spec
        grey = torch.full((1, *spec.shape), sum(spec.bounds) / 2).to(like)
        return replace(
            objective,
            unknown=replace(objective.unknown, labels=torch.stack(cotangents)),
            fit=objective.fit.through(state, mechanism=client),
            penalties=(
                (self.variation / beta**2, squared_variation),
                (
                    1.0,
                    _features_penalty(template(model, mode), state, wanted, self.rectified, grey),
                ),
            ),
        )


@dataclass(frozen=True)
class _Span:
    """The whole update, and inputs of the head that lie in the row space of its gradient.

    Attributes:
        below: the network up to the head.
        rows: (b, width) orthonormal, for every target attacked.
    """

    below: nn.Module
    rows: Sequence[Tensor | None]

    def __call__(self, objective: Objective) -> Objective:
        state = objective.fit.state
        like = next(iter(state.params.values()))
        blank = torch.zeros_like(next(r for r in self.rows if r is not None))
        rows = torch.stack([(blank if r is None else r).to(like) for r in self.rows])
        numbers = (_own_params(self.below, state), own_buffers(self.below, state))

        def outside(inputs: Tensor, rows: Tensor) -> Tensor:
            reached = torch.func.functional_call(self.below, numbers, (inputs.flatten(0, -4),))
            reached = reached.flatten(1).reshape(len(rows), -1, rows.shape[2])
            gaps = reached - reached @ rows.mT @ rows
            total: Tensor = (gaps**2).sum((1, 2))
            return total

        pictures = smoothing.natural_like(objective.unknown.spec, rows.shape[1]).to(like)
        with torch.no_grad():
            whole = outside(pictures.expand(len(rows), *pictures.shape), rows)

        def penalty(inputs: Tensor, targets: Sequence[int]) -> Tensor:
            chosen = list(targets)
            return outside(inputs, rows[chosen]) / whole[chosen]

        return replace(objective, penalties=((1.0, penalty),))


def _own_params(model: nn.Module, state: ModelState) -> dict[str, Tensor]:
    """The parameters of `state` that `model`, a part of its network, has."""
    own = {name for name, _ in model.named_parameters()}
    return {name: value for name, value in state.params.items() if name in own}


def _inner_product(outputs: Tensor, cotangents: Tensor) -> Tensor:
    return (outputs * cotangents).sum()


def _features_penalty(
    model: nn.Module, state: ModelState, features: Tensor, rectified: bool, grey: Tensor
) -> Penalty:
    """‖a − h‖² as a share of what grey images leave; where h is inactive only relu(a) counts.

    Args:
        model: ends in a.
        state: its numbers.
        features: (targets, b, width) h.
        rectified: whether h = relu(a).
        grey: (1, *shape) an image.
    """
    numbers = (dict(state.params), own_buffers(model, state))

    def gap(inputs: Tensor, wanted: Tensor) -> Tensor:
        reached = torch.func.functional_call(model, numbers, (inputs,)).flatten(1)
        gaps = reached.reshape(-1, *wanted.shape[1:]) - wanted
        if rectified:
            gaps = torch.where(wanted > 0, gaps, gaps.clamp(min=0))
        total: Tensor = (gaps**2).sum((1, 2))
        return total

    with torch.no_grad():
        whole = gap(grey.expand(features.shape[1], *grey.shape[1:]), features)

    def penalty(inputs: Tensor, targets: Sequence[int]) -> Tensor:
        chosen = list(targets)
        return gap(inputs.flatten(0, 1), features[chosen]) / whole[chosen]

    return penalty


@dataclass(frozen=True)
class _Known:
    """What an update tells without a search.

    Attributes:
        place: the deepest place where every example is known.
        activations: what is known there.
        rows: (b, width) orthonormal rows that the head's inputs are mixtures of.
    """

    place: Place | None = None
    activations: Activations | None = None
    rows: Tensor | None = None

    @property
    def kind(self) -> object:
        """Equal for targets that are searched for in one way."""
        return id(self.place), self.rows is None


def _known(
    seen: Observation, head: Place | None, chain: Sequence[Place], *, smooth: bool
) -> _Known:
    if head is None:
        return _Known()
    separated = disaggregate(seen)
    rows = row_space(seen, f"{head.reader}.weight") if smooth else None
    if isinstance(separated, str):
        return _Known(rows=rows)
    if separated.rectified and chain:
        depth, activations = peel(seen, separated, chain)
        return _Known(chain[depth], activations)
    return _Known(head, at_head(seen, separated, head), rows)


def _in_the_box(found: Search, objective: Objective) -> Search:
    """Clamp what was found into the bounds and score it by the network's own objective."""
    clamped = {"inputs": found.variables["inputs"].clamp(*objective.unknown.spec.bounds)}
    with torch.no_grad():
        values = [
            float(objective.values(_rows(clamped, [trial]), [target]))
            for trial, target in enumerate(objective.targets)
        ]
    status: list[Status] = [
        "diverged" if not math.isfinite(v) else s for v, s in zip(values, found.status, strict=True)
    ]
    scores = torch.tensor(values, dtype=torch.float64).nan_to_num(nan=math.inf)
    return replace(found, variables=clamped, values=scores, status=status)


def _better(first: Search, second: Search) -> Search:
    """Trial by trial the lower objective; the evaluations of both."""
    if not first.evaluations:
        return second
    newer = second.values <= first.values
    images = second.variables["inputs"]
    mask = newer.to(images.device).view(-1, *[1] * (images.ndim - 1))
    return Search(
        {"inputs": torch.where(mask, images, first.variables["inputs"])},
        torch.where(newer, second.values, first.values),
        [b if n else a for a, b, n in zip(first.status, second.status, newer, strict=True)],
        [a + b for a, b in zip(first.evaluations, second.evaluations, strict=True)],
        [a + b for a, b in zip(first.history, second.history, strict=True)],
    )


def _rows(variables: Variables, trials: Sequence[int]) -> Variables:
    return {k: v[list(trials)] for k, v in variables.items()}


def _joined(parts: Sequence[tuple[Sequence[int], Search]], like: Variables) -> Search:
    """Put the searches of several groups of trials back in order."""
    order = [trial for trials, _ in parts for trial in trials]
    place = [order.index(trial) for trial in range(len(order))]
    return Search(
        {k: torch.cat([s.variables[k] for _, s in parts])[place] for k in like},
        torch.cat([s.values for _, s in parts])[place],
        [[x for _, s in parts for x in s.status][i] for i in place],
        [[x for _, s in parts for x in s.evaluations][i] for i in place],
        [[x for _, s in parts for x in s.history][i] for i in place],
    )
