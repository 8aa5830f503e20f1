"""Continuation: attack a smooth copy of the network, and let it become the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradleak.attacks.closed_form.disaggregate import Separated, disaggregate
from gradleak.attacks.parts import smoothing
from gradleak.attacks.parts.distances import direction_gap
from gradleak.attacks.parts.labels import known_or_recovered
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
    A network without kinks needs no path: one search, no prior. Where the head's gradient
    separates into its examples, each x_i also has to reproduce its own features.

    Args:
        steps: accepted L-BFGS steps per restart, over all stages.
        stages: number of β; None takes 8 for one example, 6 below eight examples, else 5.
        smoothest: the first β.
        variation: c.
        restarts: independent starts; the objective chooses.
        tolerance: a network without kinks is solved at objective ≤ tolerance; an update rounded
            to single precision leaves about 1e-14.
    """

    steps: int = 1200
    stages: int | None = None
    smoothest: float = 4.0
    variation: float = 10.0
    restarts: int = 1
    tolerance: float = 1e-13

    about: ClassVar[About] = About(
        id="continuation",
        title="Activation continuation",
        paper="gradleak, this package; matching as in Geiping et al., Inverting Gradients: How "
        "Easy Is It to Break Privacy in Federated Learning?, NeurIPS 2020",
        link="https://arxiv.org/abs/2003.14053",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
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
        labels = [
            known_or_recovered(o) if s is None else s.labels
            for o, s in ((o, _separated(o)) for o in seen)
        ]
        return Objective(
            unknown=Images(
                seen[0].data,
                seen[0].knowledge.batch_size or 1,
                labels=torch.stack(labels),
                boxed=False,
                mean=0.5,
                std=0.05,
                dtype=torch.float64,
            ),
            fit=Matching(seen, direction_gap, dtype=torch.float64),
        )

    def search(self, objective: Objective, start: Variables) -> Search:
        fit = objective.fit
        network = smoothing.swapped(fit.state.model)
        smoothing.measure(network, fit.state, objective.unknown.spec)
        if not smoothing.kinked(network):
            solved = [self.tolerance] * len(fit.received)
            found = lbfgs(objective, start, steps=self.steps, solved=solved)
            return _in_the_box(found, objective)
        separated = [_separated(o) for o in fit.seen]
        short = smoothing.body(network)
        groups: dict[bool, list[int]] = {True: [], False: []}
        for trial, target in enumerate(objective.targets):
            groups[short is not None and separated[target] is not None].append(trial)
        parts = []
        for own_features, trials in groups.items():
            if trials:
                part = replace(objective, targets=tuple(objective.targets[t] for t in trials))
                path = _Path(network, self.variation)
                if own_features and short is not None:
                    path = _SeparatedPath(short[0], self.variation, short[1], separated)
                parts.append((trials, self._follow(path, part, _rows(start, trials))))
        return _joined(parts, start)

    def _follow(self, path: _Path, objective: Objective, start: Variables) -> Search:
        """L-BFGS at every β in turn; per trial, the stage that the network explains best."""
        size = objective.unknown.batch_size
        stages = self.stages or (8 if size == 1 else 6 if size < 8 else 5)
        best = last = Search(start, torch.full((len(objective.targets),), math.inf), [], [])
        for stage in range(stages):

            def told(share: float, stage: int = stage) -> None:
                objective.progress((stage + share) / stages)

            smooth = path.at(self.smoothest * 2**stage, replace(objective, progress=told))
            last = lbfgs(smooth, last.variables, steps=max(1, self.steps // stages))
            best = _better(best, _in_the_box(last, objective))
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
class _SeparatedPath(_Path):
    """The same up to the head, whose inputs and errors are known example by example.

    Here `network` ends before its last ReLU. The client's gradient below is that of the inner
    product of these pre-activations with known cotangents Wᵀ e_i, masked by the known pattern.
    """

    head: str
    separated: Sequence[Separated | None]

    def at(self, beta: float, objective: Objective) -> Objective:
        model, whole = smoothing.at_beta(self.network, beta), objective.fit.state
        own = {name for name, _ in model.named_parameters()}
        state = ModelState(
            model, {k: v for k, v in whole.params.items() if k in own}, whole.buffers
        )
        weight = whole.params[f"{self.head}.weight"]
        size = objective.unknown.batch_size
        blank = torch.zeros((size, weight.shape[1])).to(weight)
        features = [blank if s is None else s.features.to(weight) for s in self.separated]
        cotangents = [
            blank if s is None else (s.residuals.to(weight) @ weight / size) * (s.features > 0)
            for s in self.separated
        ]
        return replace(
            objective,
            unknown=replace(objective.unknown, labels=torch.stack(cotangents)),
            fit=objective.fit.through(state, mechanism=FedSGD(loss=_inner_product)),
            penalties=(
                (self.variation / beta**2, squared_variation),
                (1.0, _features_penalty(state, torch.stack(features))),
            ),
        )


def _inner_product(outputs: Tensor, cotangents: Tensor) -> Tensor:
    return (outputs * cotangents).sum()


def _features_penalty(state: ModelState, features: Tensor) -> Penalty:
    """‖relu(a) − h‖² / ‖h‖² where h is active, and of relu(a) where it is not.

    Args:
        state: network that ends in the pre-activations a.
        features: (targets, b, width) h.
    """
    model = template(state.model, "eval")

    def penalty(inputs: Tensor, targets: Sequence[int]) -> Tensor:
        numbers = (dict(state.params), own_buffers(model, state))
        flat = torch.func.functional_call(model, numbers, (inputs.flatten(0, 1),))
        wanted = features[list(targets)]
        reached = flat.reshape(wanted.shape)
        gap = torch.where(wanted > 0, reached - wanted, reached.clamp(min=0))
        return (gap**2).sum((1, 2)) / (wanted**2).sum((1, 2))

    return penalty


def _separated(seen: Observation) -> Separated | None:
    """The batch example by example, in the order of the labels where these are granted."""
    if getattr(seen.mechanism, "loss", None) is not cross_entropy:
        return None
    found = disaggregate(seen)
    if isinstance(found, str):
        return None
    labels = seen.knowledge.labels
    if labels is None:
        return found
    labels = labels.cpu()
    if not torch.equal(labels.sort().values, found.labels):
        return None
    rank = labels.argsort(stable=True).argsort()
    return Separated(found.residuals[rank], found.features[rank])


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
    mask = newer.reshape(-1, *[1] * (second.variables["inputs"].ndim - 1))
    return Search(
        {"inputs": torch.where(mask, second.variables["inputs"], first.variables["inputs"])},
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
