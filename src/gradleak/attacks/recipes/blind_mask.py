"""Blind mask: which slices of an update hold noise, found without being told."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gradleak.attacks.closed_form.linear_layer import LinearLayer
from gradleak.attacks.parts.needs import require
from gradleak.attacks.recipes.dlg import DLG
from gradleak.attacks.recipes.inverting_gradients import InvertingGradients
from gradleak.defenses.gradient_slices import Sliced
from gradleak.seeding import child
from gradleak.types import About, Attack, Batch, Exchange, Fact, Observation, Reconstruction, Update

_ATTACKS: dict[str, type[Any]] = {
    kind.about.id: kind for kind in (DLG, InvertingGradients, LinearLayer)
}


@dataclass(frozen=True)
class BlindMask:
    """min over claims x and patterns S of Σ_{j ∉ S} ‖g_j(x) − u_j‖², |S| = chosen slices.

    An honest server knows that some slices of the update hold noise, and not which. Every matching
    attack that knows the protection lets each claim choose. This one searches from several starts,
    holds a pattern still while it searches, and asks again which slices the claim fits worst:

        S from the start of a search that chooses as it goes
        repeat: x by the attack on the slices outside S; S = the slices that x fits worst
        until S stays; keep the start that leaves least outside S

    Slices that two exchanges of one state share to the bit held noise in neither of them. A closed
    form is tried under every pattern. A seed that is part of the protection gives the pattern away.
    Around a client without slices it is the attack alone.

    Args:
        attack: what inverts the slices without noise.
        passes: most patterns tried from one start.
        steps: of the attack.
        restarts: independent starts.
    """

    attack: Literal["dlg", "inverting-gradients", "linear-layer"] = "dlg"
    passes: int = 3
    steps: int = 400
    restarts: int = 4

    about: ClassVar[About] = About(
        id="blind-mask",
        title="Blind mask",
        paper="ours; it lets data drive the muting that Wang et al., INFOCOM 2022, is meant to "
        "prevent",
        link="https://github.com/wangjunxiao/GradDefense",
        modalities=frozenset({"image"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="Gaussian on the slices that fit best",
        prior="of the attack inside",
    )
    budgets: ClassVar = {"quick": {"steps": 200, "restarts": 2}, "thorough": {"restarts": 16}}

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        layer = seen.mechanism
        if not isinstance(layer, Sliced):
            return self._inside(self.restarts)(seen, generator=generator)
        seen, shared = agreed(seen, layer)
        claims: list[Reconstruction] = []
        for trial in range(self.restarts):
            claims += self._claims(seen, layer, shared, child(generator, f"start/{trial}"))
            if self.attack == LinearLayer.about.id:
                break
        left = [self.fit(seen)(c.batch) for c in claims]
        best = min(range(len(claims)), key=lambda i: (math.isnan(left[i]), left[i]))
        spent = sum(c.evaluations for c in claims)
        return replace(claims[best], objective=left[best], evaluations=spent)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """What a claim leaves unexplained of the slices that it fits best."""
        return self.fit(seen)

    def fit(self, seen: Observation) -> Callable[[Batch], float]:
        """The same: there is no penalty."""

        def left(claim: Batch) -> float:
            state = seen.state.to(torch.float64)
            like = next(iter(state.params.values()))
            labels = claim.labels.to(like.device)
            if labels.is_floating_point():
                labels = labels.to(like)
            update = Update(
                {k: v.to(like) for k, v in seen.update.values.items()}, seen.update.kind
            )
            with torch.no_grad():
                found = seen.mechanism.predict(
                    update, state, Batch(claim.inputs.to(like), labels)
                ).values
            return float(sum((found[k] - v).square().sum() for k, v in update.values.items()))

        return left

    def _inside(self, restarts: int) -> Attack:
        kind = _ATTACKS[self.attack]
        known = {f.name for f in fields(kind)}
        given = {"steps": self.steps, "restarts": restarts}
        attack: Attack = kind(**{k: v for k, v in given.items() if k in known})
        return attack

    def _claims(
        self,
        seen: Observation,
        layer: Sliced,
        shared: tuple[int, ...] | None,
        generator: torch.Generator,
    ) -> Iterator[Reconstruction]:
        attack = self._inside(1)
        slices = layer.slices(seen.state)
        suspects = shared if shared is not None else layer.believed(slices)
        if self.attack == LinearLayer.about.id:
            chosen = min(layer.rule.chosen, len(slices))
            patterns = itertools.combinations(range(len(slices)), chosen)
            for pattern in [suspects] if suspects is not None else patterns:
                yield attack(silenced(seen, slices, pattern), generator=generator)
            return
        tried: list[tuple[int, ...] | None] = []
        while suspects not in tried and len(tried) < self.passes:
            tried.append(suspects)
            belief = replace(layer, suspects=suspects)
            claim = attack(replace(seen, mechanism=belief), generator=generator)
            yield claim
            if shared is not None:
                return
            like = next(iter(seen.state.params.values()))
            labels = claim.batch.labels.to(like.device)
            soft = labels.to(like) if labels.is_floating_point() else labels
            asked = Batch(claim.batch.inputs.to(like), soft)
            misfits = layer.misfits(seen.update, seen.state, asked)
            worst = misfits.argsort(descending=True)[: layer.rule.chosen]
            suspects = tuple(sorted(worst.tolist()))


def agreed(seen: Observation, layer: Sliced) -> tuple[Observation, tuple[int, ...] | None]:
    """What several exchanges of the latest state tell together.

    Returns:
        The observation with, on every slice that two exchanges share, what they share; and the
        slices that no two share, None where there is one exchange alone.
    """
    updates = [e.update for e in seen.exchanges if e.state is seen.state]
    if len(updates) < 2:
        return seen, None
    flat = [torch.cat([v.flatten() for v in u.values.values()]) for u in updates]
    merged, unsure = flat[-1].clone(), []
    for number, index in enumerate(layer.slices(seen.state)):
        pairs = itertools.combinations(flat, 2)
        same = next((a for a, b in pairs if torch.equal(a[index], b[index])), None)
        if same is None:
            unsure.append(number)
        else:
            merged[index] = same[index]
    return _with(seen, merged), tuple(unsure)


def silenced(
    seen: Observation, slices: tuple[Tensor, ...], pattern: tuple[int, ...]
) -> Observation:
    """The observation with zeros on some slices, as if a sparsifier had dropped them."""
    flat = torch.cat([v.flatten() for v in seen.update.values.values()])
    for j in pattern:
        flat[slices[j]] = 0
    return _with(seen, flat)


def _with(seen: Observation, flat: Tensor) -> Observation:
    values = seen.update.values
    parts = torch.split(flat, [v.numel() for v in values.values()])
    whole = {k: p.reshape(v.shape) for (k, v), p in zip(values.items(), parts, strict=True)}
    exchange = Exchange(seen.state, Update(whole, seen.update.kind))
    return replace(seen, exchanges=(*seen.exchanges[:-1], exchange))
