"""What a reader needs to know about a protection before relying on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sheet:
    """A protection's data sheet, in words.

    Attributes:
        paper: where it comes from.
        link: to it; empty where there is none.
        promises: what its authors or users expect of it.
        broken_by: the adaptive attack that undoes it, or "none known" and why.
        cost: in accuracy, bytes and time, in kind; figures stand in the documentation.
    """

    paper: str
    link: str
    promises: str
    broken_by: str
    cost: str
