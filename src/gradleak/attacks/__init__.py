"""Attacks: Observation -> Reconstruction. Nothing here may import who knows the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gradleak.attacks import active, closed_form, labels, recipes
from gradleak.attacks.parts.objective import Engine
from gradleak.attacks.recipe import Recipe
from gradleak.defenses import gathered
from gradleak.registry import build as _build
from gradleak.registry import described_in
from gradleak.seeding import target_generator
from gradleak.types import About, Attack, Observation, Reconstruction

ATTACKS: dict[str, type[Any]] = dict(
    sorted(
        pair
        for package in (active, closed_form, recipes)
        for pair in described_in(package, About).items()
    )
)
globals().update({attack.__name__: attack for attack in ATTACKS.values()})


def build(spec: str) -> Attack:
    """Build an attack from "id:field=value,..."."""
    attack: Attack = _build("attack", spec, ATTACKS)
    return attack


def attack_all(
    attack: Attack,
    observations: Sequence[Observation],
    *,
    seed: int = 0,
    engine: Engine = "auto",
    trials_at_once: int | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> list[Reconstruction]:
    """Run one attack over many observations, vectorised where they share a broadcast state.

    The i-th starts exactly where the attack alone would start on the i-th observation with
    `gradleak.seeding.target_generator(seed, i)`.

    Args:
        attack: any attack.
        observations: one per target.
        seed: of the attacker's randomness.
        engine: how trials run together; "auto" measures.
        trials_at_once: most trials that may step together, where memory is short.
        progress: called with (targets done, in fractions where a search tells; targets in all).

    Raises:
        NotApplicable: an observation lacks what the attack needs.
    """
    claims: dict[int, Reconstruction] = {}
    observations = [gathered(o) for o in observations]
    vectorised = isinstance(attack, Recipe)
    for group in _groups(observations) if vectorised else [[i] for i in range(len(observations))]:
        seen = [observations[i] for i in group]
        generators = [target_generator(seed, i) for i in group]
        if isinstance(attack, Recipe):
            before, size = len(claims), len(group)

            def partly(share: float, before: int = before, size: int = size) -> None:
                progress(before + share * size, len(observations))

            found = attack.on_group(
                seen,
                generators=generators,
                engine=engine,
                trials_at_once=trials_at_once,
                progress=partly,
            )
        else:
            found = [attack(seen[0], generator=generators[0])]
        claims.update(zip(group, found, strict=True))
        progress(len(claims), len(observations))
    return [claims[i] for i in range(len(observations))]


def _groups(observations: Sequence[Observation]) -> list[list[int]]:
    """Indices of observations that share state, belief, data and granted facts."""
    groups: list[tuple[Observation, list[int]]] = []
    for i, o in enumerate(observations):
        for first, members in groups:
            if (
                o.state is first.state
                and o.mechanism == first.mechanism
                and o.data == first.data
                and o.knowledge.batch_size == first.knowledge.batch_size
                and o.knowledge.prior is first.knowledge.prior
                and (o.knowledge.bn_statistics is None) == (first.knowledge.bn_statistics is None)
            ):
                members.append(i)
                break
        else:
            groups.append((o, [i]))
    return [members for _, members in groups]


__all__ = ["ATTACKS", "attack_all", "build", "labels", *(a.__name__ for a in ATTACKS.values())]
