"""Runs jobs on a Ray cluster, with the records, the store and the progress of `run.executor`.

The one module that imports Ray, and it is imported only when `--ray` is given. Every job is a
remote generator that yields the shares done and, last, its trial. Data and broadcast states travel
through Ray's object store, so that nodes need gradleak and the user's own modules, but no file
system in common. Ray's own retries are off: what a dead worker or node costs is decided here.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from gradleak.data import Dataset
from gradleak.errors import InvalidInput
from gradleak.run.executor import RERUNS, Progress, WorkersFailed
from gradleak.run.jobs import JobSpec, version
from gradleak.run.trial import Trial, failed, load_data, run_trial

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else every start warns

import ray
import ray.exceptions

LOCAL = "local"
"""The address that starts a Ray of one's own on this machine."""

_SECONDS_TO_CONNECT = 5.0
_SECONDS_BETWEEN_SHARES = 0.5

# Ray heads speak gRPC, hence HTTP/2: preface and empty settings, answered by settings (type 4).
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS = bytes([4])

_Answer: TypeAlias = "float | tuple[dict[str, Any], bytes | None]"
"""The share done, or the record and the tensors of the trial."""


@contextlib.contextmanager
def connected(address: str, *, workers: int | None) -> Iterator[None]:
    """Be connected to the cluster at `address`, or to the one this process is connected to already.

    What Ray prints meanwhile, such as the dump of a node that died, goes to stderr.

    Args:
        address: "local", "auto" or HOST:PORT.
        workers: processors of a local cluster; None takes all.

    Raises:
        InvalidInput: there is no such cluster, or it has no processors.
    """
    if ray.is_initialized():
        yield
        return
    here: dict[str, Any] = {"address": address}
    if address == LOCAL:
        here |= {"num_cpus": workers, "include_dashboard": False}
    else:
        check(address)
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**here, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InvalidInput(f"--ray {address!r}: cannot connect, {_line(error)}") from None
    finally:
        with contextlib.suppress(ValueError, TypeError):  # not the main thread, not Python's
            signal.signal(signal.SIGTERM, on_termination)
    try:
        if not ray.cluster_resources().get("CPU"):
            raise InvalidInput(f"--ray {address!r}: the cluster has no processors")
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ray.shutdown()


def check(address: str) -> None:
    """Find out that nobody is there before Ray does, which takes a minute or ends the process.

    Raises:
        InvalidInput: no Ray head answers at HOST:PORT.
    """
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InvalidInput(f"--ray {address!r}: expected local, auto or HOST:PORT")
    try:
        with socket.create_connection((host, int(port)), timeout=_SECONDS_TO_CONNECT) as line:
            line.sendall(_HTTP2_GREETING)
            answer = line.recv(9)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInput(f"--ray {address!r}: cannot connect, {reason}") from None
    if answer[3:4] != _HTTP2_SETTINGS:
        raise InvalidInput(f"--ray {address!r}: something listens there that is no Ray head")


def run_on_ray(
    jobs: Sequence[JobSpec], *, workers: int | None, progress: Progress[JobSpec]
) -> Generator[Trial]:
    """Run jobs on the connected cluster and yield trials as they finish.

    A worker that dies, alone or with its node, costs the job it had in hand, which runs again,
    `RERUNS` times at most; after that the job is recorded as an error.

    Args:
        jobs: what to do.
        workers: most jobs at once; None leaves it to the cluster.
        progress: called with (job, share of it done).

    Raises:
        WorkersFailed: workers do not start.
    """
    load = _Load(jobs)
    waiting = deque(jobs)
    running: dict[Any, JobSpec] = {}
    deaths: dict[str, int] = {}
    spoke = False
    try:
        while waiting or running:
            while waiting and len(running) < (workers or len(jobs)):
                job = waiting.popleft()
                running[load.submit(job)] = job
            (stream,), _ = ray.wait(list(running), num_returns=1)
            job = running[stream]
            try:
                answer: _Answer = ray.get(next(stream))
            except (ray.exceptions.RayError, StopIteration) as error:
                del running[stream]
                deaths[job.key] = deaths.get(job.key, 0) + 1
                if deaths[job.key] <= RERUNS:
                    waiting.appendleft(job)
                elif spoke:
                    times = deaths[job.key]
                    yield failed(job, f"its Ray worker died {times} times: {_line(error)}")
                else:
                    raise WorkersFailed(f"Ray workers do not start: {_line(error)}") from None
                continue
            spoke = True
            if isinstance(answer, float):
                progress(job, answer)
            else:
                del running[stream]
                yield Trial(*answer)
    finally:
        for stream in running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(stream, force=True)


class _Load:
    """What jobs take along: data and states once per cluster, where to find modules, versions."""

    def __init__(self, jobs: Sequence[JobSpec]) -> None:
        files = {(job.directory, name) for job in jobs for name in _files(job)}
        self._files = {name: ray.put((Path(d) / name).read_bytes()) for d, name in files}
        kinds = {(job.data, job.data_dir) for job in jobs}
        self._data = {kind: ray.put(load_data(*kind)) for kind in kinds}
        self._task = ray.remote(
            num_cpus=1,
            num_gpus=1 if jobs[0].device == "cuda" else 0,
            max_retries=0,
            num_returns="streaming",
        )(_answers)

    def submit(self, job: JobSpec) -> Any:
        """Hand a job to the cluster and return the stream of its answers."""
        return self._task.remote(
            job.to_json(),
            {name: [self._files[name]] for name in _files(job)},
            [self._data[job.data, job.data_dir]],  # in a list: fetched once per worker, not per job
            directory=str(Path.cwd()),
            path=[str(p) for p in sys.path],
            versions=_versions(),
        )


def _files(job: JobSpec) -> list[str]:
    """What a job reads from the directory of its run."""
    return [name for name in (job.state, job.prior_file) if name is not None]


def _answers(
    spec: dict[str, Any],
    files: dict[str, list[Any]],
    data: list[Any],
    *,
    directory: str,
    path: list[str],
    versions: str,
) -> Generator[_Answer]:
    """The worker's side: run one job in a thread of its own and tell how far it is."""
    if versions != _versions():
        raise RuntimeError(f"a node has {_versions()}, this run is of {versions}")
    yield 0.0
    sys.path.extend(p for p in path if p not in sys.path)
    if Path(directory).is_dir():
        os.chdir(directory)
    said: queue.Queue[float | Trial | BaseException] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="gradleak-") as scratch:
        job = JobSpec.from_json(spec | {"directory": scratch})
        for name, (content,) in files.items():
            file = Path(scratch) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(ray.get(content))
        threading.Thread(target=_run, args=(job, data[0], said), daemon=True).start()
        while isinstance(answer := said.get(), float):
            yield answer
    if isinstance(answer, BaseException):
        raise RuntimeError(f"{type(answer).__name__}: {answer}")
    yield answer.record, answer.tensors


def _run(job: JobSpec, data: Any, said: queue.Queue[float | Trial | BaseException]) -> None:
    torch.set_num_threads(1)  # counts for the thread that calls it
    last = time.monotonic()

    def progress(share: float) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_SHARES:
            last = time.monotonic()
            said.put(share)

    try:
        said.put(run_trial(job, dataset=_fetched(data), progress=progress))
    except BaseException as error:  # such as a user's sys.exit: the job must not hang
        said.put(error)


@functools.lru_cache(maxsize=2)
def _fetched(data: Any) -> Dataset:
    dataset: Dataset = ray.get(data)
    return dataset


def _versions() -> str:
    return f"gradleak {version()}, torch {torch.__version__.partition('+')[0]}"


def _line(error: BaseException) -> str:
    """The line of an error that says why: of a remote traceback the last one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1 if isinstance(error, ray.exceptions.RayTaskError) else 0][:400]
