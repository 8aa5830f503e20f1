"""How the server's learning rate changes from round to round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from gradleak.errors import InvalidInput
from gradleak.mechanisms.client import check_positive


class Schedule(Protocol):
    """(round from 1, rounds) -> factor of the learning rate."""

    def __call__(self, server_round: int, rounds: int) -> float: ...


@dataclass(frozen=True)
class Constant:
    """1 in every round."""

    id: ClassVar[str] = "constant"

    def __call__(self, server_round: int, rounds: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Step:
    """factor^⌊(round − 1) / every⌋."""

    every: int = 100
    factor: float = 0.5

    id: ClassVar[str] = "step"

    def __post_init__(self) -> None:
        check_positive(every=self.every, factor=self.factor)

    def __call__(self, server_round: int, rounds: int) -> float:
        return float(self.factor ** ((server_round - 1) // self.every))


@dataclass(frozen=True)
class Cosine:
    """floor + (1 − floor) (1 + cos(π (round − 1) / rounds)) / 2."""

    floor: float = 0.0

    id: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise InvalidInput(f"floor={self.floor}: expected a share in [0, 1]")

    def __call__(self, server_round: int, rounds: int) -> float:
        wave = (1 + math.cos(math.pi * (server_round - 1) / rounds)) / 2
        return self.floor + (1 - self.floor) * wave


SCHEDULES: Mapping[str, type[Schedule]] = {s.id: s for s in (Constant, Step, Cosine)}
