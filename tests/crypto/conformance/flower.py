"""Flower's SecAgg+ as an `Implementation`: its workflow, its clients' modifier, one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import FitIns, bytes_to_ndarray, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common.recorddict_compat import parameters_to_arrayrecord
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey

from gradleak.crypto import Aborted, Total
from gradleak.crypto.conformance import Played
from gradleak.crypto.encoding import Reals
from gradleak.federate.grid import FIRST_NODE, InProcessGrid

STAGES = Stage.all()
Edit = Callable[[str, int, Message], None]
"""Stage, client, and the server's message, to be changed in place."""


class Client(NumPyClient):
    def __init__(self, vector: Reals, examples: int) -> None:
        self.vector, self.examples = vector, examples

    def fit(self, parameters: Any, config: Any) -> Any:
        return [self.vector], self.examples, {"loss": 0.5}


class Stopped(Exception):
    """The round ends after the stage that was looked at."""


class Grid(InProcessGrid):
    """Loses clients, lets requests be changed, and remembers every answer."""

    def __init__(
        self, app: ClientApp, nodes: int, drops: Mapping[int, int], edit: Edit | None
    ) -> None:
        super().__init__(app, nodes=nodes)
        self.drops, self.edit = drops, edit
        self.answers: list[tuple[str, int, Message]] = []
        self.last: str | None = None

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        here = []
        for message in messages:
            client = message.metadata.dst_node_id - FIRST_NODE
            stage = str(message.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
            if self.drops.get(client, len(STAGES)) > STAGES.index(stage):
                if self.edit:
                    self.edit(stage, client, message)
                (answer,) = super().send_and_receive([message])
                self.answers.append((stage, client, answer))
                here.append(answer)
        if stage == self.last:
            raise Stopped
        return here


class Strategy:
    """Asks everyone, keeps what it is given."""

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.results: list[Any] = []
        self.mean: Reals | None = None

    def configure_fit(self, server_round: int, parameters: Any, client_manager: Any) -> Any:
        class Proxy:
            def __init__(self, node_id: int) -> None:
                self.node_id = node_id

        return [(Proxy(FIRST_NODE + c), FitIns(parameters, {})) for c in range(self.clients)]

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        self.results = results
        self.mean = parameters_to_ndarrays(results[0][1].parameters)[0]
        return None, {}


@dataclass(frozen=True)
class FlowerSecAggPlus:
    """Every client has `examples` of at most `max_weight`; by default all share with all.

    At weight 1 integers are quantised exactly.
    """

    clients: int = 5
    threshold: int = 3
    shares: int | float = 1.0
    examples: int = 1000
    max_weight: float = 1000.0
    steps: int = 4
    modulus: int = 2**32
    tolerance: float = 1e-9

    @property
    def survives(self) -> int:
        return self.clients - self.threshold

    def play(self, vectors: Mapping[int, Reals], drops: Mapping[int, int]) -> Played:
        strategy, grid = self.run(vectors, drops)
        if strategy.mean is None:
            raise Aborted("the workflow halted")
        hidden = {
            client: bytes_to_ndarray(records[Key.MASKED_PARAMETERS][1]).astype(np.uint64)
            for stage, client, answer in grid.answers
            if stage == Stage.COLLECT_MASKED_VECTORS
            for records in [answer.content.config_records[RECORD_KEY_CONFIGS]]
        }
        there = tuple(sorted(proxy.node_id - FIRST_NODE for proxy, _ in strategy.results))
        return Played(Total(strategy.mean * len(there), there), hidden)

    def run(
        self,
        vectors: Mapping[int, Reals],
        drops: Mapping[int, int],
        edit: Edit | None = None,
        last: str | None = None,
    ) -> tuple[Strategy, Grid]:
        """One round, or what of it is up to a stage; no mean where the workflow halted."""

        def client_fn(context: Context) -> Any:
            vector = vectors[int(context.node_config["partition-id"])]
            return Client(vector, self.examples).to_client()

        grid = Grid(ClientApp(client_fn, mods=[secaggplus_mod]), self.clients, drops, edit)
        strategy = Strategy(self.clients)
        context = LegacyContext(
            Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={}),
            strategy=strategy,
        )
        config = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
        context.state.config_records[MAIN_CONFIGS_RECORD] = config
        start = ndarrays_to_parameters([np.zeros_like(vectors[0])])
        context.state.array_records[MAIN_PARAMS_RECORD] = parameters_to_arrayrecord(start, True)
        workflow = SecAggPlusWorkflow(self.shares, self.threshold, max_weight=self.max_weight)
        grid.last = last
        with contextlib.suppress(Stopped):
            workflow(grid, context)
        return strategy, grid
