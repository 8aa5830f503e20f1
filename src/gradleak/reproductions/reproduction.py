"""What a reproduction is: a table of a paper, cut into cells that can be computed one by one."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from gradleak.errors import InvalidInput, nearest
from gradleak.metrics import clustered_mean, median_interval, paired_difference
from gradleak.run.jobs import version

Budget = Literal["quick", "full"]
BUDGETS: tuple[Budget, ...] = ("quick", "full")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asks of a reproduction.

    Attributes:
        budget: "quick" shows that it works, "full" is the table.
        seed: every random draw derives from it.
        data_dir: where data sets lie; None takes $GRADLEAK_DATA or the user cache, and what the
            package embeds where they are not there.
    """

    budget: Budget = "quick"
    seed: int = 0
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise InvalidInput(f"--budget {self.budget!r}: {nearest(self.budget, BUDGETS)}")
        if not 0 <= self.seed < 2**63:
            raise InvalidInput(f"--seed {self.seed}: expected a whole number from 0 to 2^63 − 1")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise InvalidInput(f"--data-dir {self.data_dir!r}: no such directory")


@dataclass(frozen=True)
class Cell:
    """The smallest piece of a table that is computed and kept as a whole.

    Attributes:
        content: plain values, all that decides the outcome.
        needs: keys of the cells whose records it builds on.
        trials: how much work it is.
    """

    content: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    trials: int = 1

    @property
    def key(self) -> str:
        """Names the cell by its content."""
        text = json.dumps([self.content, self.needs, version()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Estimate:
    """A measured number with its interval; None where nothing was measured."""

    value: float | None
    low: float | None
    high: float | None
    confidence: float
    n: int

    @classmethod
    def nothing(cls) -> Estimate:
        """Not measured."""
        return cls(None, None, None, 0.95, 0)

    @classmethod
    def mean(cls, values: Sequence[float]) -> Estimate:
        """Mean over independent targets, with Student's t interval."""
        return cls._of(values, clustered_mean([[v] for v in values]))

    @classmethod
    def median(cls, values: Sequence[float]) -> Estimate:
        """Median over independent targets, with the interval that order statistics give.

        Of fewer than six targets that is their range, which holds the median with a confidence
        of 1 − 2^(1 − n) only.
        """
        n, interval = len(values), median_interval([[v] for v in values])
        low, high, confidence = interval.low, interval.high, interval.confidence
        if math.isinf(low):
            low, high, confidence = min(values), max(values), 1 - 2.0 ** (1 - n)
        return cls(statistics.median(values), low, high, confidence, n)

    @classmethod
    def difference(cls, first: Sequence[float], second: Sequence[float]) -> Estimate:
        """Mean of first − second over the same targets, with Student's t interval."""
        interval = paired_difference([[v] for v in first], [[v] for v in second])
        return cls._of([a - b for a, b in zip(first, second, strict=True)], interval)

    @classmethod
    def _of(cls, values: Sequence[float], interval: Any) -> Estimate:
        value = sum(values) / len(values)
        return cls(value, interval.low, interval.high, interval.confidence, len(values))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of the paper beside ours.

    Attributes:
        row: "TABLE / LINE / ...": rows of one table stand together.
        metric: what is measured.
        unit: of both figures.
        ours: measured here.
        note: why they agree or do not, or what can be said where the paper's figure is unknown.
        paper: the paper's figure; None where nobody could read it there.
        paper_source: where it was read, or "unverified".
        agrees: whether they agree; None without the paper's figure.
        curve: (line, position) where the row is a point of its table's figure; points of one line
            stand in order.
        picture: images of some claims side by side, as a data URI; empty for none.
    """

    row: str
    metric: str
    unit: str
    ours: Estimate
    note: str
    paper: float | None = None
    paper_source: str = "unverified"
    agrees: bool | None = None
    curve: tuple[str, str] | None = None
    picture: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as `reproduction.json` has it."""
        return asdict(self)


class Reproduction(ABC):
    """A published table or figure, computed again.

    Attributes:
        id: its name on the command line.
        title: what is reproduced, in a few words.
        paper: authors, title, place, year.
        link: to the paper.
        method: what is done, for the reader of the report.
        deviations: where this differs from the paper.
        positions: what the positions of curves are, for charts.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    link: ClassVar[str]
    method: ClassVar[str]
    deviations: ClassVar[tuple[str, ...]]
    positions: ClassVar[str] = "training steps"

    @abstractmethod
    def plan(self, request: Request) -> list[Cell]:
        """Every cell of the table; a cell comes after those it needs.

        Raises:
            InvalidInput: data are missing.
        """

    @abstractmethod
    def run(
        self,
        cell: Mapping[str, Any],
        found: Sequence[Mapping[str, Any]],
        *,
        data_dir: str | None,
        progress: Callable[[float], None],
    ) -> dict[str, Any]:
        """Compute one cell; equal contents give equal records.

        Args:
            cell: its content.
            found: records of the cells it needs, in that order.
            data_dir: where data sets lie.
            progress: told the share done.
        """

    @abstractmethod
    def rows(self, cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        """The table from the records of all cells, by key."""
