"""What protections cost: the trainings of `gradleak train`, kept beside the findings of an audit.

costs.json              {"schema_version": 1, "trainings": [...]}, one for each --cost
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradleak import jsonsafe
from gradleak.errors import CorruptFile, GradleakError, InvalidInput
from gradleak.metrics import Interval, clopper_pearson
from gradleak.report.wording import listing
from gradleak.run.jobs import defense_spec
from gradleak.run.store import read_json, write_whole

COSTS, TRAINING = "costs.json", "training.json"
SCHEMA_VERSION = 1

_CONDITIONS = (
    "data", "model", "mechanism", "clients", "rounds", "batch_size", "fraction", "partition",
    "topology", "aggregation", "test_examples",
)  # fmt: skip
"""Settings in which a training must equal the undefended one it is compared with."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a protection costs in federated training.

    Attributes:
        accuracy: at the end, mean over seeds, with its 95 % interval.
        lost: accuracy of the undefended training minus this one, as a share.
        seconds: mean time of a round.
        slower: the same over that of the undefended training.
        bytes_up: sent by all clients in a round, mean.
        larger: the same over that of the undefended training.
        seeds: trainings.
        tested: examples that each accuracy is a share of.
    """

    accuracy: float
    interval: Interval
    lost: float
    seconds: float
    slower: float
    bytes_up: float
    larger: float
    seeds: int
    tested: int


def check(sources: Sequence[str]) -> None:
    """Find a wrong directory before anything is done; raises as `keep` does."""
    for source in sources:
        _summary(source)


def keep(directory: Path, sources: Sequence[str]) -> None:
    """Read some trainings and write what counts of them into `directory`.

    Raises:
        InvalidInput: there is no training.json.
        CorruptFile: it is not one.
    """
    content = {"schema_version": SCHEMA_VERSION, "trainings": [_summary(s) for s in sources]}
    write_whole(directory / COSTS, jsonsafe.dumps(content, indent=1) + "\n")


def kept(directory: Path) -> list[dict[str, Any]]:
    """The trainings kept in `directory`; none where nobody asked.

    Raises:
        CorruptFile: costs.json is damaged.
    """
    path = directory / COSTS
    if not path.exists():
        return []
    content = read_json(path)
    try:
        assert content["schema_version"] == SCHEMA_VERSION
        return [dict(t) for t in content["trainings"]]
    except (AssertionError, KeyError, TypeError):
        raise CorruptFile(f"{str(path)!r} was not written by this version of gradleak") from None


def _summary(source: str) -> dict[str, Any]:
    path = Path(source) / TRAINING
    if not path.exists():
        raise InvalidInput(f"--cost {source}: no {TRAINING}, expected --out of `gradleak train`")
    content = read_json(path)
    try:
        settings, rounds = dict(content["settings"]), list(content["rounds"])
        return {
            "source": source,
            "defense": _full(str(settings["defense"])),
            "conditions": {n: ({"aggregation": "none"} | settings).get(n) for n in _CONDITIONS},
            "accuracy": math.nan if content["accuracy"] is None else float(content["accuracy"]),
            "test_examples": int(content["test_examples"]),
            "seconds": _mean([float(r["seconds"]) for r in rounds]),
            "bytes_up": _mean([float(r["bytes_up"]) for r in rounds]),
            "rounds": len(rounds),
            "status": str(content["status"]),
            "reason": content.get("reason"),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{str(path)!r} is not a training: {error!r}") from None


def cost_of(
    spec: str, scenario: Mapping[str, Any], trainings: Sequence[Mapping[str, Any]]
) -> Cost | str:
    """What a protection costs on the data and network of a scenario, or why nobody knows.

    Args:
        spec: notation of the protection.
        scenario: of its findings.
        trainings: as `kept` returns them.
    """
    named = [t for t in trainings if t["defense"] == _full(spec)]
    if not named:
        return "no training with this protection and these fields"
    here = [
        t for t in named if all(t["conditions"][k] == scenario.get(k) for k in ("data", "model"))
    ]
    if not here:
        other = {f"{t['conditions']['data']}, {t['conditions']['model']}" for t in named}
        return f"trained on {listing(sorted(other))} instead"
    done = [t for t in here if t["status"] == "done"]
    if not done:
        reason = here[0]["reason"]
        return f"the training was {here[0]['status']} after {here[0]['rounds']} rounds" + (
            f": {reason}" if reason else ""
        )
    first = done[0]
    done = [t for t in done if t["conditions"] == first["conditions"]]
    plain = [
        t
        for t in trainings
        if t["defense"] == _full("none")
        and t["status"] == "done"
        and t["conditions"] == first["conditions"]
    ]
    if not plain:
        return "no undefended training under the same conditions"
    accuracy, tested = _mean([t["accuracy"] for t in done]), int(first["test_examples"])
    seconds, sent = _mean([t["seconds"] for t in done]), _mean([t["bytes_up"] for t in done])
    return Cost(
        accuracy=accuracy,
        interval=clopper_pearson(round(accuracy * tested), tested),
        lost=_mean([t["accuracy"] for t in plain]) - accuracy,
        seconds=seconds,
        slower=_ratio(seconds, _mean([t["seconds"] for t in plain])),
        bytes_up=sent,
        larger=_ratio(sent, _mean([t["bytes_up"] for t in plain])),
        seeds=len(done),
        tested=tested,
    )


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points that no other is as low as in both coordinates and below in one."""
    return [
        i
        for i, (a, b) in enumerate(points)
        if not any(x <= a and y <= b and (x < a or y < b) for x, y in points)
    ]


def _full(notation: str) -> str:
    """The notation with every field, as findings have it; unchanged where it names nothing."""
    try:
        return defense_spec(notation)[1]
    except GradleakError:
        return notation


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else math.nan


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
