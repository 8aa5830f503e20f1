"""Federated training from settings to files, in this process or on Flower's simulation."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from gradleak.auditing import cores, environment
from gradleak.errors import InvalidInput, nearest
from gradleak.federate.checkpoint import Checkpoint
from gradleak.federate.client import MEMORY, client_app
from gradleak.federate.federation import Federation, federation
from gradleak.federate.gossip import Neighbours, under
from gradleak.federate.grid import InProcessGrid
from gradleak.federate.records import arrays_of, state_of, stored, tensors_of
from gradleak.federate.server import Rounds, Stopped
from gradleak.federate.settings import TrainSettings
from gradleak.federate.summed import Summed

ENGINES = ("in-process", "flower")


class Watcher(Protocol):
    """Is told how far training is."""

    def running(self, done: float, *, total: int, resumed: int) -> None: ...


class _Unwatched:
    def running(self, done: float, *, total: int, resumed: int) -> None:
        """Tell nobody."""


def train(
    settings: TrainSettings,
    *,
    out: Path,
    engine: str = "in-process",
    record_to: Path | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train, or go on where an earlier run of the same training was stopped.

    Args:
        settings: what is trained.
        out: directory of training.json, checkpoint.safetensors and model.safetensors.
        engine: "in-process" runs one client after another here, and what protections remember
            survives a restart; "flower" runs them in Flower's simulation on Ray, where a restart
            begins with an empty memory.
        record_to: directory of a recording of what the curious server sees; in a gossip, of what
            the neighbours of the topology's attacker show it.
        watcher: told after every round.

    Returns:
        The content of training.json.

    Raises:
        InvalidInput: settings that make no sense, or `out` holds another training.
        Stopped: it cannot go on; training.json says why.
    """
    if engine not in ENGINES:
        raise InvalidInput(f"--engine {engine!r}: {nearest(engine, ENGINES)}")
    made = federation(settings)
    kept = Checkpoint(out, _about(settings))
    if kept.record["status"] == "done":
        return kept.record
    server = server_app(made, kept, watcher or _Unwatched(), record_to=record_to)
    client = client_app(settings)
    nodes = settings.clients + made.helpers
    try:
        with _quiet():
            if engine == "in-process":
                memories: dict[int, RecordDict] = {}
                for i in range(settings.clients):
                    own = under(kept.tensors, f"memory/{i}/")
                    memories[i] = RecordDict({MEMORY: arrays_of(own)} if own else {})
                grid = InProcessGrid(client, nodes=nodes, states=memories)
                server(grid, Context(grid.run.run_id, 1, {}, RecordDict(), {}))
            else:
                _simulate(server, client, nodes=nodes)
    except KeyboardInterrupt:
        kept.finish("interrupted", _state(made, kept), reason="interrupted")
        raise
    return kept.record


def server_app(
    made: Federation, kept: Checkpoint, watcher: Watcher, *, record_to: Path | None = None
) -> ServerApp:
    """The server's app: every round is tested and kept before the next begins."""
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        settings, done = made.settings, len(kept.rounds)
        strategy: Rounds
        playing = grid
        if made.secure_sum is not None:
            playing = made.secure_sum.at_server(grid)
            strategy = Summed(made, playing, done=done)
        elif made.edges:
            strategy = Neighbours(made, done=done, tensors=kept.tensors)
        else:
            strategy = Rounds(made, done=done)

        if record_to is not None:
            strategy.kept_in(record_to)

        def tested(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0:
                return None
            values = tensors_of(arrays)
            accuracy, loss, _ = made.test(state_of(values, made.initial))
            entry = strategy.entry | {"accuracy": accuracy, "loss": loss}
            told = {"loss": loss} if accuracy is None else {"accuracy": accuracy, "loss": loss}
            tensors = {f"state/{k}": v for k, v in values.items()} | strategy.tensors()
            kept.keep(entry, tensors | _memories(grid))
            watcher.running(len(kept.rounds), total=settings.rounds, resumed=done)
            return MetricRecord(told)

        try:
            strategy.start(
                playing,
                arrays_of(stored(_state(made, kept))),
                num_rounds=settings.rounds - done,
                timeout=settings.timeout,
                evaluate_fn=tested,
            )
        except Stopped as reason:
            kept.finish("stopped", _state(made, kept), reason=str(reason))
            raise
        state = _state(made, kept)
        accuracy, loss, examples = made.test(state, final=True)
        quality = made.quality(state)
        kept.finish(
            "done",
            state,
            accuracy=accuracy,
            test_loss=loss,
            test_examples=examples,
            sample_quality=None if quality is None else dataclasses.asdict(quality),
            reason=None,
        )

    return app


def _state(made: Federation, kept: Checkpoint) -> Any:
    """The state after the last whole round."""
    values = under(kept.tensors, "state/")
    return state_of(values, made.initial) if values else made.initial


def _memories(grid: Grid) -> dict[str, Tensor]:
    """What clients remember, where this process holds it."""
    if not isinstance(grid, InProcessGrid):
        return {}
    return {
        f"memory/{i}/{k}": v
        for i, state in grid.states.items()
        if MEMORY in state
        for k, v in tensors_of(state[MEMORY]).items()
    }


def _simulate(server: ServerApp, client: Any, *, nodes: int) -> None:
    """Run the apps on Flower's simulation engine, one client per core at a time."""
    if importlib.util.find_spec("ray") is None:
        raise InvalidInput("--engine flower needs Ray: pip install 'gradleak[ray]'")
    from flwr.simulation import run_simulation

    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=nodes,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {
                "num_cpus": cores(),
                "include_dashboard": False,
                "log_to_driver": False,
                "logging_level": "error",
            },
        },
    )


def _about(settings: TrainSettings) -> dict[str, Any]:
    return {
        "gradleak_version": version("gradleak"),
        "settings": dataclasses.asdict(settings),
        "environment": environment("cpu") | {"flower": version("flwr")},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower's log of every round off stderr; errors still show."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


app = ServerApp()
"""The server of a deployment: settings, and `out`, come from the run configuration."""


@app.main()  # type: ignore[untyped-decorator]
def deployed(grid: Grid, context: Context) -> None:
    """Train with the settings of the run."""
    given = dict(context.run_config)
    out = Path(str(given.pop("out", "gradleak-training")))
    settings = TrainSettings.of(given)
    kept = Checkpoint(out, _about(settings))
    if kept.record["status"] != "done":
        server_app(federation(settings), kept, _Unwatched())(grid, context)
