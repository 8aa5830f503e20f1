"""What a protocol promises, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sheet:
    """A protocol's data sheet.

    Attributes:
        title: its name in the literature.
        paper: where it comes from.
        link: to it; empty where there is none.
        trusts: who must not collude, and what the server must not do.
        survives: which dropouts.
        leaks: what the server learns besides the sum.
        cost: in steps, bytes and time, in kind; figures stand in the documentation.
    """

    title: str
    paper: str
    link: str
    trusts: str
    survives: str
    leaks: str
    cost: str
