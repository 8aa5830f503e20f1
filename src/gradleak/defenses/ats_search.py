"""The search for ATS policies: what a policy should cost an attacker, and what a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradleak.defenses.ats import ATS, OPERATIONS
from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import own_buffers, template
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.types import Batch, ModelState

_POINTS = 21
_SMALL = 1e-5


@dataclass(frozen=True)
class Scored:
    """A policy and its scores, both of which predict and neither of which measures.

    Attributes:
        policy: for `ats:policy=`.
        privacy: of `privacy_score`; low is private.
        accuracy: of `accuracy_score`; high is accurate.
    """

    policy: str
    privacy: float
    accuracy: float


def privacy_score(
    state: ModelState, policy: str, images: Batch, *, generator: torch.Generator
) -> float:
    """∫_0^1 cos(g(t x* + (1 − t) noise), g(x*)) dt with x* = T(x), by trapezoids at 21 points.

    Averaged over tensors and images. A gradient that tells the way to x* from afar is easy to
    invert: low is private.

    Args:
        state: a network trained a little, as the paper asks.
        policy: of T.
        images: (n, channels, height, width) that are public.
        generator: of signs and noise.
    """
    made = ATS(policy).encode(state, images, generator)
    t = torch.linspace(0, 1, _POINTS).to(made.inputs)
    noise = torch.rand(made.inputs.shape[1:], generator=generator).to(made.inputs)
    core = FedSGD()

    def gradient(x: Tensor, label: Tensor) -> dict[str, Tensor]:
        one = Batch(x[None], label[None])
        return core.gradient(state, state.params, one)

    areas = []
    for x, label in zip(made.inputs, made.labels, strict=True):
        shares = t.reshape(-1, *[1] * x.ndim)
        path = torch.func.vmap(gradient, (0, None))(shares * x + (1 - shares) * noise, label)
        cosines = torch.stack(
            [cosine_similarity(g.flatten(1), g[-1:].flatten(1)) for g in path.values()]
        ).mean(0)
        areas.append(torch.trapezoid(cosines, t))
    return float(torch.stack(areas).mean())


def accuracy_score(
    state: ModelState, policy: str, images: Batch, *, runs: int, generator: torch.Generator
) -> float:
    """−Σ log(v + 10⁻⁵) + 1/(v + 10⁻⁵) over the eigenvalues v of the inputs' correlation.

    Correlated are the gradients in T(x) of the summed outputs, over the images of one of `runs`
    equal parts; the score is their mean. Images that the network tells apart give eigenvalues near
    one: high is accurate.

    Args:
        state: an untrained network, as the paper asks.
        policy: of T.
        images: (n, channels, height, width) that are public; n / runs are scored together.
        runs: parts.
        generator: of signs.
    """
    model = template(state.model, "eval")
    fixed = own_buffers(model, state)

    def outputs(x: Tensor) -> Tensor:
        summed: Tensor = torch.func.functional_call(model, (dict(state.params), fixed), (x,)).sum()
        return summed

    made = ATS(policy).encode(state, images, generator).inputs
    scores = []
    for part in made.chunk(runs):
        jacobian = torch.func.grad(outputs)(part).flatten(1).double()
        v = torch.linalg.eigvalsh(torch.corrcoef(jacobian)) + _SMALL
        scores.append(-(v.log() + 1 / v).sum())
    return float(torch.stack(scores).mean())


def search(
    trained: ModelState,
    untrained: ModelState,
    public: Batch,
    *,
    candidates: int = 100,
    length: int = 3,
    accurate: float = 0.5,
    images: int = 20,
    runs: int = 10,
    generator: torch.Generator,
) -> list[Scored]:
    """Random policies, the most private first, of those that should cost little accuracy.

    Several of the first joined by "/" make a hybrid.

    Source: Gao et al., CVPR 2021. Deviations: policies have one length, so that hybrids may be
    made; the `accurate` share of candidates with the highest accuracy score is admitted
    (published: −85 and above, a number that belongs to one network); all 50 sub-policies can be
    drawn, without repetition.

    Args:
        trained: network whose gradients `privacy_score` looks at.
        untrained: network that `accuracy_score` looks at.
        public: images; privacy is scored on the first `images`, accuracy on the first 100 · runs.
        candidates: policies drawn (published: 1500).
        length: sub-policies in each.
        accurate: share admitted.
        images: for the privacy score.
        runs: of the accuracy score.
        generator: source of policies, signs and noise.
    """
    if candidates < 1 or not 0 < accurate <= 1:
        raise InvalidInput(
            f"candidates={candidates}, accurate={accurate}: expected at least 1, and in (0, 1]"
        )
    found = [
        _scored("-".join(map(str, numbers)), trained, untrained, public, images, runs, generator)
        for numbers in _drawn(candidates, length, generator)
    ]
    least = sorted((s.accuracy for s in found), reverse=True)[math.ceil(accurate * len(found)) - 1]
    return sorted((s for s in found if s.accuracy >= least), key=lambda s: s.privacy)


def _drawn(count: int, length: int, generator: torch.Generator) -> list[Sequence[int]]:
    draw = partial(torch.randperm, len(OPERATIONS), generator=generator)
    return [draw()[:length].tolist() for _ in range(count)]


def _scored(
    policy: str,
    trained: ModelState,
    untrained: ModelState,
    public: Batch,
    images: int,
    runs: int,
    generator: torch.Generator,
) -> Scored:
    few = Batch(public.inputs[:images], public.labels[:images])
    many = Batch(public.inputs[: 100 * runs], public.labels[: 100 * runs])
    return Scored(
        policy,
        privacy_score(trained, policy, few, generator=generator),
        accuracy_score(untrained, policy, many, runs=runs, generator=generator),
    )
