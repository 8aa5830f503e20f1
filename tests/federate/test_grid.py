"""The grid in this process runs Flower's apps as Flower's engines do."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

from gradleak.federate.grid import FIRST_NODE, RAISED, InProcessGrid


def counting(message: Message, context: Context) -> Message:
    """Add one to the arrays, count the calls, and fail where the partition says so."""
    if context.node_config["partition-id"] == context.run_config.get("failing"):
        context.state["calls"] = MetricRecord({"n": 99})
        raise RuntimeError("planted")
    before = context.state.metric_records.get("calls", MetricRecord({"n": 0}))["n"]
    context.state["calls"] = MetricRecord({"n": before + 1})
    (key,) = message.content.array_records
    arrays = [a + 1 for a in message.content.array_records[key].to_numpy_ndarrays()]
    message.content[key] = ArrayRecord(arrays)  # what a careless app does to its message
    content = RecordDict({key: ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
    return Message(content, reply_to=message)


def app_of(train: ClientAppCallable) -> ClientApp:
    app = ClientApp()
    app.train()(train)
    return app


def messages(grid: InProcessGrid) -> list[Message]:
    record = RecordDict({"arrays": ArrayRecord([np.zeros(2, np.float32)])})
    return [Message(record, node, "train") for node in grid.get_node_ids()]


def test_flower_still_has_the_parts_that_the_grid_needs() -> None:
    """Fails where a new Flower moved what `grid` imports from its inner modules."""
    grid = InProcessGrid(app_of(counting), nodes=2)
    assert list(grid.get_node_ids()) == [FIRST_NODE, FIRST_NODE + 1]
    message = grid.create_message(RecordDict(), "train", FIRST_NODE, "1")
    assert message.metadata.run_id == grid.run.run_id
    assert message.metadata.src_node_id == FIRST_NODE - 1


def test_nodes_get_copies_and_keep_their_state() -> None:
    grid = InProcessGrid(app_of(counting), nodes=3)
    for _ in range(2):
        answers = list(grid.send_and_receive(messages(grid)))
        for answer in answers:
            assert answer.content["arrays"].to_numpy_ndarrays()[0].tolist() == [1, 1]
    assert [a.metadata.src_node_id for a in answers] == list(grid.get_node_ids())
    assert [s["calls"]["n"] for s in grid.states.values()] == [2, 2, 2]
    later = InProcessGrid(app_of(counting), nodes=3, states=grid.states)
    later.send_and_receive(messages(later))
    assert [s["calls"]["n"] for s in later.states.values()] == [3, 3, 3]


def test_a_node_that_raises_answers_with_an_error_and_keeps_its_old_state() -> None:
    grid = InProcessGrid(app_of(counting), nodes=2, run_config={"failing": 1})
    good, bad = grid.send_and_receive(messages(grid))
    assert not good.has_error()
    assert bad.error.code == RAISED
    assert bad.error.reason == "RuntimeError: planted"
    assert "calls" not in grid.states[1]


def test_a_node_that_is_late_never_answers() -> None:
    grid = InProcessGrid(app_of(counting), nodes=2)
    assert list(grid.send_and_receive(messages(grid), timeout=0)) == []


def test_a_stock_strategy_runs_on_it() -> None:
    grid = InProcessGrid(app_of(counting), nodes=2)
    app = ServerApp()
    found = []

    @app.main()
    def main(grid: InProcessGrid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0)
        result = strategy.start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=3)
        found.append(result.arrays.to_numpy_ndarrays()[0])

    app(grid, Context(1, 1, {}, RecordDict(), {}))
    assert found[0].tolist() == [3, 3]
