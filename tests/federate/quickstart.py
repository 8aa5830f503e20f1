"""The quick-start app of `examples`, in this process, and what its auditor does with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from flwr.app import Context, RecordDict

from gradleak.federate.grid import InProcessGrid
from gradleak.run.recordings import Entry, read_recording, write_truth
from gradleak.types import Batch

EXAMPLE = Path(__file__).parents[2] / "examples/flower-quickstart"
PARTS = ("task", "client_app", "server_app")


@contextmanager
def imported(root: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules of the app that lies in `root`."""
    names = ["quickstart", *(f"quickstart.{part}" for part in PARTS)]
    before = dict(sys.modules)
    sys.path.insert(0, str(root))
    try:
        for name in names:
            sys.modules.pop(name, None)
        yield {part: importlib.import_module(f"quickstart.{part}") for part in PARTS}
    finally:
        sys.path.remove(str(root))
        for name in names:
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def run_app(app: Mapping[str, ModuleType], *, nodes: int, **changes: Any) -> list[Entry]:
    """Train on the in-process grid; returns what was recorded, if anything was."""
    config = {"num-server-rounds": 1, "learning-rate": 0.1, "examples": 1, "seed": 0, **changes}
    grid = InProcessGrid(app["client_app"].app, nodes=nodes, run_config=config)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
    app["server_app"].app(grid, context)
    directory = Path(str(config.get("recording", "")))
    return read_recording(directory) if (directory / "recording.json").exists() else []


def tell_truth(task: ModuleType, entries: list[Entry], path: Path, *, seed: int = 0) -> Path:
    """What only the auditor holds: every client's images, by the partition it names itself."""
    batches = {
        (e.round, e.node): Batch(
            *task.load_partition(int(e.metrics["partition-id"]), examples=1, seed=seed)
        )
        for e in entries
    }
    write_truth(path, batches)
    return path
