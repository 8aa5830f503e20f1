"""From a reproduction to `reproduction.json` and `report.html`, cell by cell, resumably."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gradleak import jsonsafe
from gradleak.auditing import RESULT, Unwatched, Watcher, cores, environment
from gradleak.errors import CorruptFile, GradleakError, InvalidInput
from gradleak.reproductions.page import PAGE, RESULT_FILE, render
from gradleak.reproductions.reproduction import Cell, Reproduction, Request
from gradleak.run.executor import Work, run_here, run_in_processes
from gradleak.run.jobs import version
from gradleak.run.store import Store, read_json, write_whole
from gradleak.run.trial import Trial
from gradleak.run.worker import resolve

SCHEMA_VERSION = 1


class CellsFailed(GradleakError):
    """Some cells of a table could not be computed (exit status 3)."""


@dataclass(frozen=True)
class Reproduced:
    """What a reproduction left.

    Attributes:
        directory: where `reproduction.json`, `trials.jsonl` and `report.html` lie.
        result: content of `reproduction.json`.
    """

    directory: Path
    result: Mapping[str, Any]

    @property
    def page(self) -> Path:
        """The report to open in a browser."""
        return self.directory / PAGE


@dataclass(frozen=True)
class CellJob:
    """A cell on its way to a process.

    Attributes:
        owner: "module:class" of its reproduction.
        cell: what to compute.
        data_dir: where data sets lie.
        found: records of the cells it needs.
    """

    owner: str
    cell: Cell
    data_dir: str | None
    found: tuple[Mapping[str, Any], ...] = ()

    @property
    def key(self) -> str:
        return self.cell.key

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"key": self.key}


def run_cell(job: Mapping[str, Any], *, progress: Callable[[float], None]) -> Trial:
    """Compute the cell of a job as plain values; an error is a record too."""
    reproduction = resolve(job["owner"])()
    started = time.process_time()
    try:
        record = reproduction.run(
            job["cell"]["content"], job["found"], data_dir=job["data_dir"], progress=progress
        )
    except Exception as error:  # one cell must not take the table with it
        return _failed(job["key"], f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
    seconds = time.process_time() - started
    return Trial({"key": job["key"], "state": "measured", "cpu_seconds": seconds, **record})


def _failed(key: str, reason: str) -> Trial:
    return Trial({"key": key, "state": "error", "reason": reason})


WORK: Work[CellJob] = Work(
    f"{__name__}:{run_cell.__name__}", lambda job, reason: _failed(job.key, reason)
)


def reproduce(
    reproduction: Reproduction,
    request: Request,
    *,
    out: Path | None = None,
    workers: int | None = None,
    watcher: Watcher | None = None,
) -> Reproduced:
    """Compute a reproduction, or what is left of it, and write its report.

    Args:
        reproduction: which.
        request: how thoroughly, and from what.
        out: directory of the report; the same one resumes.
        workers: processes; 0 runs in this one, None takes one per core.
        watcher: told how far it is.

    Raises:
        InvalidInput: the request makes no sense, or data are missing.
        CellsFailed: cells could not be computed; the others are kept.
        WorkersFailed: worker processes do not start.
    """
    if workers is not None and not 0 <= workers <= 1024:
        raise InvalidInput(f"--workers {workers}: expected a number from 0 to 1024")
    watcher = watcher or Unwatched()
    directory = out or Path(f"gradleak-reproduce-{reproduction.id}")
    watcher.preparing("loading data")
    cells = reproduction.plan(request)
    _check_directory(directory)
    kind = type(reproduction)
    jobs = [CellJob(f"{kind.__module__}:{kind.__qualname__}", c, request.data_dir) for c in cells]
    with Store(directory) as store:
        _run(jobs, store, workers=cores() if workers is None else workers, watcher=watcher)
        records = {cell.key: store.records[cell.key] for cell in cells}
        result = {
            "schema_version": SCHEMA_VERSION,
            "gradleak_version": version(),
            "id": reproduction.id,
            "title": reproduction.title,
            "paper": reproduction.paper,
            "link": reproduction.link,
            "budget": request.budget,
            "seed": request.seed,
            "method": reproduction.method,
            "deviations": list(reproduction.deviations),
            "positions": reproduction.positions,
            "command": _command(reproduction, request),
            "environment": environment("cpu"),
            "cpu_seconds": sum(record["cpu_seconds"] for record in records.values()),
            "rows": [row.to_json() for row in reproduction.rows(cells, records)],
        }
        write_whole(directory / RESULT_FILE, jsonsafe.dumps(result, indent=1) + "\n")
        render(directory)
    return Reproduced(directory, result)


def _run(jobs: Sequence[CellJob], store: Store, *, workers: int, watcher: Watcher) -> None:
    """Compute the cells that the store lacks, in waves: those that others need come first."""

    def measured(key: str) -> bool:
        return store.records.get(key, {}).get("state") == "measured"

    left = [job for job in jobs if not measured(job.key)]
    size = {job.key: job.cell.trials for job in jobs}
    total = sum(size.values())
    done = float(total - sum(size[job.key] for job in left))
    resumed = int(done)
    shares: dict[str, float] = {}

    def progress(job: CellJob, share: float) -> None:
        shares[job.key] = share * size[job.key]
        watcher.running(done + sum(shares.values()), total=total, resumed=resumed)

    while left:
        wave = [
            replace(job, found=tuple(store.records[key] for key in job.cell.needs))
            for job in left
            if all(measured(key) for key in job.cell.needs)
        ]
        trials = (
            run_in_processes(wave, WORK, workers=min(workers, len(wave)), progress=progress)
            if workers
            else run_here(wave, WORK, progress=progress)
        )
        with contextlib.closing(trials):
            for trial in trials:
                key = trial.record["key"]
                store.append(trial.record)
                shares.pop(key, None)
                done += size[key]
                watcher.running(done + sum(shares.values()), total=total, resumed=resumed)
        failed = [job.key for job in wave if not measured(job.key)]
        if failed:
            raise CellsFailed(
                f"{len(failed)} of {len(wave)} cells failed, the first by "
                f"{store.records[failed[0]]['reason']}; the others are kept"
            )
        left = [job for job in left if not measured(job.key)]


def _check_directory(directory: Path) -> None:
    """Refuse to write over somebody else's results."""
    path = directory / RESULT_FILE
    try:
        ours = not path.exists() or "gradleak_version" in read_json(path)
    except (CorruptFile, TypeError):
        ours = False
    if not ours or (directory / RESULT).exists():
        raise InvalidInput(
            f"{str(directory)!r} holds other results: choose another --out, or move them away"
        )


def _command(reproduction: Reproduction, request: Request) -> str:
    """The command that repeats a reproduction."""
    words = ["gradleak", "reproduce", reproduction.id, "--budget", request.budget]
    if request.seed:
        words += ["--seed", str(request.seed)]
    if request.data_dir is not None:
        words += ["--data-dir", request.data_dir]
    return shlex.join(words)
