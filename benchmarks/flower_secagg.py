"""One round of Flower's SecAgg+ in this process: its own workflow and its own client mod.

Messages are handed over as they are, with copies that nobody is charged for, so Flower's figures
hold no serialisation; vectors count as bytes where Flower has made bytes of them.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.constant import ErrorCode
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key

from gradleak.crypto.encoding import Reals
from gradleak.crypto.rehearsal import Cost
from gradleak.federate.grid import FIRST_NODE, RAISED, InProcessGrid

MAX_WEIGHT = 1000
UPLOAD = 2


class Nodes(InProcessGrid):
    """Flower's client mod on every node, timed; some are gone from the upload on."""

    def __init__(self, vector: Reals, clients: int, gone: frozenset[int]) -> None:
        super().__init__(None, nodes=clients)
        self.cost, self._gone, self._step = Cost(), gone, -1
        self._fitted = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([vector]), MAX_WEIGHT, {})
        self._began = self._trained = 0.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let every node answer, and stop the server's clock meanwhile."""
        self.cost.server_seconds.append(time.process_time() - self._began)
        self._step += 1
        answers = [self._ask(copy.deepcopy(m)) for m in messages]
        self._began = time.process_time()
        return answers

    def start(self) -> None:
        """Start the server's clock."""
        self._began = time.process_time()

    def done(self) -> Cost:
        """The price list, when the workflow has returned."""
        self.cost.server_seconds.append(time.process_time() - self._began)
        return self.cost

    def _ask(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node in self._gone and self._step >= UPLOAD:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)
        message.metadata.__dict__["_message_id"] = str(node)
        self._trained = 0.0
        began = time.process_time()
        try:
            answer = secaggplus_mod(message, self._contexts[node], self._train)
        except Exception as error:
            answer = Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=message)
        took = time.process_time() - began - self._trained
        cost, number = self.cost, node - FIRST_NODE
        cost.client_seconds[number] = cost.client_seconds.get(number, 0.0) + took
        for tally, sent in ((cost.bytes_down, message), (cost.bytes_up, answer)):
            tally[number] = tally.get(number, 0) + _size(sent)
        return answer

    def _train(self, message: Message, context: Context) -> Message:
        """What training would return, without training."""
        began = time.process_time()
        answer = Message(compat.fitres_to_recorddict(self._fitted, True), reply_to=message)
        self._trained = time.process_time() - began
        return answer


def _size(message: Message) -> int:
    """Bytes of names and contents of the protocol's record; numbers count as 8."""
    if message.has_error():
        return 0

    def size(value: object) -> int:
        if isinstance(value, (bytes, str)):
            return len(value)
        return sum(map(size, value)) if isinstance(value, list) else 8

    records = message.content.config_records.values()
    return sum(len(k) + size(v) for record in records for k, v in record.items())


class Strategy(FedAvg):  # type: ignore[misc]
    """Asks every client, sends no model, and returns the average that the workflow made."""

    def configure_fit(self, server_round, parameters, client_manager):  # type: ignore[no-untyped-def]
        return [(p, FitIns(parameters, {})) for p in client_manager.all().values()]

    def aggregate_fit(self, server_round, results, failures):  # type: ignore[no-untyped-def]
        return (results[0][1].parameters if results else None), {}


class Proxy:
    """A client as the workflow knows it."""

    def __init__(self, node: int) -> None:
        self.cid, self.node_id = str(node), node


def play(
    vector: Reals, *, clients: int, shares: int, threshold: int, gone: frozenset[int] = frozenset()
) -> tuple[Reals | None, Cost]:
    """One round in which every client has the same vector.

    Args:
        vector: shape (length,); float64, as ours takes it.
        clients: how many.
        shares: of each secret, the client's own included.
        threshold: shares that open one.
        gone: clients lost after sharing their keys, before the upload.

    Returns:
        The average, None if the round failed; and what it took.
    """
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    grid = Nodes(vector, clients, frozenset(FIRST_NODE + c for c in gone))
    manager = SimpleClientManager()
    manager.clients = {str(n): Proxy(n) for n in grid.get_node_ids()}
    context = LegacyContext(
        context=Context(1, 0, {}, RecordDict(), {}),
        config=None,
        strategy=Strategy(initial_parameters=Parameters([], "numpy.ndarray")),
        client_manager=manager,
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(
        Parameters([], "numpy.ndarray"), True
    )
    workflow = SecAggPlusWorkflow(
        shares if shares < clients else 1.0,
        threshold if shares < clients else threshold / clients,
        max_weight=float(MAX_WEIGHT),
    )
    grid.start()
    workflow(grid, context)
    cost = grid.done()
    found = parameters_to_ndarrays(
        compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
    )
    return (np.asarray(found[0]) if found else None), cost
