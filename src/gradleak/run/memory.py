"""What a run will need of memory, and how it is arranged to fit: said before the work starts.

    resident peak of a worker ≈ base + data + updates + searches + trials at once · step

The step is foretold by a dry run without storage; what single operations use for scratch is covered
by a margin. `benchmarks/memory.py` holds estimates against measured peaks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch

from gradleak.attacks.parts import memory
from gradleak.attacks.parts.fast.fit import KEPT_COORDINATES
from gradleak.attacks.recipe import Recipe
from gradleak.defenses import undefended
from gradleak.errors import InvalidInput
from gradleak.types import Attack, DataSpec, Mechanism, ModelState

GB = 10**9

_BASE = 450_000_000
"""Interpreter, PyTorch and gradleak in a worker that has taken its first step."""
_MARGIN_ALONE, _MARGIN_TOGETHER = 1.25, 3.0
"""Peak of a step over the dry run's: of one trial, and of trials in one vectorised program."""


@dataclass(frozen=True)
class Need:
    """Resident memory of a worker with one job, in bytes.

    Attributes:
        fixed: all that does not depend on how many trials step together.
        step: one trial's step; None where it cannot be foretold.
        trials: trials of the job.
    """

    fixed: int
    step: int | None
    trials: int

    def at(self, together: int) -> int:
        """The peak when so many trials step together."""
        margin = _MARGIN_ALONE if together == 1 else _MARGIN_TOGETHER
        return self.fixed + int(margin * together * (self.step or 0))

    def most(self, room: int) -> int:
        """How many trials may step together in `room` bytes; 0 if not even one fits."""
        fitting = (n for n in range(self.trials, 0, -1) if self.at(n) <= room)
        return next(fitting, 0)


def needed(
    attack: Attack,
    client: Mechanism,
    state: ModelState,
    spec: DataSpec,
    *,
    batch_size: int,
    targets: int,
    data: int = 0,
) -> Need:
    """Foretell what a job needs.

    Args:
        attack: any attack.
        client: the mechanism it differentiates through.
        state: broadcast state; only shapes count.
        spec: public form of the data.
        batch_size: examples per target.
        targets: targets of the job.
        data: bytes of the data that a worker holds.
    """
    search = attack if isinstance(attack, Recipe) else None
    trials = targets * search.restarts if search else 1
    width = search.dtype.itemsize if search else 4
    copies = min(search.copies, 4 * search.steps) if search else 1
    parameters = sum(p.numel() for p in state.params.values())
    variables = batch_size * (torch.Size(spec.shape).numel() + spec.classes)
    rounds = int(getattr(undefended(client), "rounds", 1))
    updates = (targets + 3) * parameters * (4 * rounds + width)
    beside = min(trials * parameters, KEPT_COORDINATES) * width if trials > 1 else 0
    fixed = _BASE + data + updates + beside + trials * copies * variables * width
    fixed += search.beside(batch_size * torch.Size(spec.shape).numel()) if search else 0
    held = batch_size * (search.crowd if search else 1)
    step = _step(cast(Hashable, undefended(client)), state.model, spec, held, search is not None)
    return Need(fixed, None if step is None else step * width // 4, trials)


@dataclass(frozen=True)
class Arrangement:
    """How jobs share the memory there is.

    Attributes:
        workers: workers at once; 0 is this process, None leaves it to a cluster.
        together: trials that may step together, for each job.
        peak: resident peak of the worker with the largest job, in bytes.
    """

    workers: int | None
    together: tuple[int, ...]
    peak: int
    free: int | None
    unknown: bool

    def __str__(self) -> str:
        """One line for the user."""
        place = "this process" if self.workers == 0 else f"{self.workers or 'Ray'} workers"
        if self.workers == 1:
            place = "1 worker"
        each = f"about {_gb(self.peak)}" + (" each" if (self.workers or 2) > 1 else "")
        text = f"plan: {len(self.together)} jobs in {place}, {each}"
        if self.free is not None:
            text += f" of {_gb(self.free)} free"
        if self.unknown:
            text += ", not counting this network's steps, which a dry run cannot follow"
        return text


def arranged(
    needs: Sequence[Need], *, workers: int | None, most_workers: int, free: int | None
) -> Arrangement:
    """Divide memory: workers first, then trials that step together.

    Args:
        needs: of every job.
        workers: as asked for; None takes as many as fit, up to `most_workers`.
        most_workers: processors, or so.
        free: bytes the run may use; None where nobody knows.

    Raises:
        InvalidInput: not even one trial at a time fits.
    """
    unknown = any(n.step is None for n in needs)
    alone = max(n.at(1) for n in needs)
    count = most_workers if workers is None else workers
    if free is None:
        together = tuple(n.trials for n in needs)
        return Arrangement(workers, together, max(n.at(n.trials) for n in needs), None, unknown)
    fitting = free // alone
    if not fitting:
        raise InvalidInput(
            f"memory: one trial at a time needs about {_gb(alone)} and {_gb(free)} are free; "
            "expected a smaller --batch-size, --local-steps or --model, or --memory GB if more "
            "is free than seems"
        )
    if workers is not None and workers > fitting:
        raise InvalidInput(
            f"memory: --workers {workers} need about {_gb(workers * alone)} and {_gb(free)} are "
            f"free; expected at most --workers {fitting}"
        )
    count = min(count, fitting)
    room = free // max(count, 1)
    together = tuple(n.most(room) for n in needs)
    peak = max(n.at(k) for n, k in zip(needs, together, strict=True))
    return Arrangement(count, together, peak, free, unknown)


def free_memory(granted: float | None, *, device: str) -> int | None:
    """Bytes that attacks may still use: the GPU's, the machine's, or those of its control group.

    Args:
        granted: GB of a user who knows better.
        device: where attacks run, "cpu" or "cuda".

    Returns:
        None where the system does not tell.
    """
    if granted is not None:
        return int(granted * GB)
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = [limit - used for limit, used in _cgroups()]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found.append(1024 * kilobytes["MemAvailable"])
    except (OSError, KeyError, ValueError, IndexError):
        names = getattr(os, "sysconf_names", {})
        if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found)) if found else None


def _cgroups(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """(limit, used) of every control group around this process that has a limit, v1 and v2."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = top / path.strip("/")
        while group != top.parent:
            with contextlib.suppress(OSError, ValueError):  # no limit, or not to be seen from here
                limit, used = (int((group / name).read_text()) for name in names[:2])
                rows = (group / "memory.stat").read_text().splitlines()
                counts = dict(row.split() for row in rows)
                yield limit, used - int(counts.get(names[2], 0))
            group = group.parent


def _gb(size: int) -> str:
    return f"{size / GB:.2g} GB" if size < 10 * GB else f"{size / GB:.0f} GB"


@lru_cache(maxsize=64)
def _step(
    client: Hashable, model: torch.nn.Module, spec: DataSpec, batch_size: int, search: bool
) -> int | None:
    """A dry run in float32, of a search's step or of the client's round alone."""
    state = ModelState.of(model)
    run = memory.of_step if search else memory.of_round
    try:
        return run(cast(Mechanism, client), state, spec, batch_size=batch_size)
    except Exception:  # a network that asks its numbers something
        return None
