"""Runs jobs in worker processes, or in this one; the caller alone writes records.

A worker is a fresh interpreter that reads jobs from its standard input and answers on its standard
output, one JSON line each, a result being followed by the bytes of its tensors. The input pipe is
also the leash: when this process dies, however it dies, the pipe ends and the worker exits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Generic, Protocol, TypeVar

import torch

from gradleak import jsonsafe
from gradleak.errors import GradleakError
from gradleak.run.jobs import JobSpec
from gradleak.run.trial import Trial, failed
from gradleak.run.worker import resolve

RERUNS = 2
"""How often a job runs again after its worker died."""

_SECONDS_TO_EXIT = 5.0


class Job(Protocol):
    """Work that any process can do."""

    @property
    def key(self) -> str:
        """Names the job."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The job as plain values."""
        ...


J = TypeVar("J", bound=Job)

Progress = Callable[[J, float], None]
"""(job, share of it done)."""


@dataclass(frozen=True)
class Work(Generic[J]):
    """How jobs of one kind are done.

    Attributes:
        run: "module:function" that takes a job as plain values and is told `progress`.
        failed: the record of a job that could not be run, and why.
    """

    run: str
    failed: Callable[[J, str], Trial]


TRIALS: Work[JobSpec] = Work("gradleak.run.trial:run_planned", failed)

_START_WORKER = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from gradleak.run.worker import main; main(sys.argv[2])"
)


class WorkersFailed(GradleakError):
    """Worker processes die before they take a job (exit status 3)."""


def run_here(jobs: Sequence[J], work: Work[J], *, progress: Progress[J]) -> Generator[Trial]:
    """Run jobs one after another in this process, on one thread as the workers do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for job in jobs:
            yield resolve(work.run)(job.to_json(), progress=functools.partial(progress, job))
    finally:
        torch.set_num_threads(threads)


def run_in_processes(
    jobs: Sequence[J], work: Work[J], *, workers: int, progress: Progress[J]
) -> Generator[Trial]:
    """Run jobs in `workers` processes and yield trials as they finish.

    A worker that dies costs the job it had in hand, which runs again, `RERUNS` times at most;
    after that the job is recorded as an error.

    Raises:
        WorkersFailed: workers do not start.
    """
    waiting = deque(jobs)
    deaths: dict[str, int] = {}
    stillborn = 0
    inbox: queue.Queue[tuple[_Worker[J], Any]] = queue.Queue()
    pool: list[_Worker[J]] = []
    left = len(waiting)
    try:
        while left:
            while waiting and len(pool) < workers:
                worker = _Worker(work.run, inbox)
                pool.append(worker)
                worker.give(waiting.popleft())
            worker, message = inbox.get()
            job = worker.job
            if isinstance(message, Trial):
                left -= 1
                worker.job = None
                if waiting:
                    worker.give(waiting.popleft())
                yield message
            elif isinstance(message, float):
                stillborn = 0
                if job is not None:
                    progress(job, message)
            else:
                pool.remove(worker)
                reason = worker.bury()
                if not worker.spoke:
                    stillborn += 1
                    if stillborn > RERUNS:
                        raise WorkersFailed(f"worker processes do not start: {reason}")
                if job is None:
                    continue
                deaths[job.key] = deaths.get(job.key, 0) + worker.spoke
                if deaths[job.key] <= RERUNS:
                    waiting.appendleft(job)
                else:
                    left -= 1
                    yield work.failed(
                        job, f"its worker process died {deaths[job.key]} times: {reason}"
                    )
    finally:
        for worker in pool:
            worker.end()


@dataclass(eq=False)
class _Worker(Generic[J]):
    run: str
    inbox: queue.Queue[tuple[_Worker[J], Any]]
    job: J | None = None
    spoke: bool = False
    process: subprocess.Popen[bytes] = field(init=False)
    complaints: IO[bytes] = field(init=False)
    listener: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START_WORKER, json.dumps([str(p) for p in sys.path]), self.run],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            env=environment,
        )
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def give(self, job: J) -> None:
        """Hand over a job; a worker that has died meanwhile is found out by its listener."""
        self.job = job
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(jsonsafe.dumps(job.to_json()).encode() + b"\n")
            self.process.stdin.flush()

    def _listen(self) -> None:
        """Turn what the worker says into messages: a share done, a trial, or None at its end."""
        stream = self.process.stdout
        assert stream is not None
        with contextlib.suppress(ValueError, KeyError, OSError):
            while line := stream.readline():
                said = jsonsafe.loads(line)
                self.spoke = True
                if "share" in said:
                    self.inbox.put((self, float(said["share"])))
                    continue
                size = said["tensors"]
                tensors = None if size is None else stream.read(size)
                if tensors is not None and len(tensors) != size:
                    break
                self.inbox.put((self, Trial(said["record"], tensors)))
        self.inbox.put((self, None))

    def bury(self) -> str:
        """Clean up after a worker that ended by itself; say why it did, in a line."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=_SECONDS_TO_EXIT)
        self.complaints.seek(0)
        lines = self.complaints.read()[-4000:].decode(errors="replace").strip().splitlines()
        self.end()
        code = self.process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return f"{how}, {lines[-1].strip()}" if lines else how

    def end(self) -> None:
        """End the process now."""
        self.process.kill()
        self.process.wait()
        self.listener.join()
        for stream in (self.process.stdin, self.process.stdout, self.complaints):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
