"""An attack that knows the protection, and the same attack unaware of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Finding = Mapping[str, Any]


def is_adaptive(finding: Finding) -> bool:
    """Whether the attacker knew the protection; trivially so where there is none."""
    return finding.get("adaptive", True) is not False


def deciding(found: Sequence[Finding]) -> list[Finding]:
    """The findings that a verdict rests on.

    What an unaware attack misses says nothing of a protection, so it does not count beside its
    adaptive twin; what it recovers has leaked all the same.
    """
    aware = {_pair(f) for f in found if is_adaptive(f)}
    return [
        f for f in found if is_adaptive(f) or f.get("verdict") == "leaks" or _pair(f) not in aware
    ]


def unaware_only(found: Sequence[Finding]) -> list[Finding]:
    """Unaware findings without an adaptive twin."""
    aware = {_pair(f) for f in found if is_adaptive(f)}
    return [f for f in found if not is_adaptive(f) and _pair(f) not in aware]


def _pair(finding: Finding) -> str:
    """What two findings share that differ in what the attacker knows of the protection alone."""
    threat = dict(finding.get("threat") or {})
    threat["knows"] = sorted(set(threat.get("knows") or ()) - {"mechanism"})
    names = ("attack_spec", "attack", "defense_spec", "defense")
    return repr(
        (
            sorted(finding["scenario"].items()),
            sorted(threat.items()),
            [finding.get(name) for name in names],
        )
    )
