"""No protection: the reference every protection is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gradleak.defenses.sheet import Sheet
from gradleak.types import Mechanism, Update


@dataclass(frozen=True)
class NoDefense:
    """ũ = u."""

    id: ClassVar[str] = "none"
    title: ClassVar[str] = "No protection"
    sheet: ClassVar[Sheet] = Sheet(
        paper="the control of every comparison",
        link="",
        promises="Nothing.",
        broken_by="every attack: it is the control",
        cost="none",
    )

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return mechanism

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        return None
