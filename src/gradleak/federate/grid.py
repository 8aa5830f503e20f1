"""A Flower grid in this process: real apps and real messages, no engine around them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
FIRST_NODE = SUPERLINK_NODE_ID + 1


class InProcessGrid(Grid):  # type: ignore[misc]
    """Runs the app of every node in turn, as Flower's simulation does in its actors.

    A node keeps its `Context` from message to message, and gets copies of what is sent to it. A
    node whose app raises answers with an error, and its context stays as it was before.

    Args:
        app: of all nodes.
        nodes: how many; node i has `partition-id` i and `num-partitions` in its configuration.
        run_config: what every app finds in `context.run_config`.
        states: by partition, what nodes kept in an earlier run.
    """

    def __init__(
        self,
        app: ClientApp,
        *,
        nodes: int,
        run_config: Mapping[str, bool | float | int | str] | None = None,
        states: Mapping[int, RecordDict] | None = None,
    ) -> None:
        self._app = app
        self._run = Run.create_empty(run_id=1)
        self._answers: dict[str, Message] = {}
        self._contexts = {
            FIRST_NODE + i: Context(
                run_id=self._run.run_id,
                node_id=FIRST_NODE + i,
                node_config={"partition-id": i, "num-partitions": nodes},
                state=(states or {}).get(i, RecordDict()),
                run_config=dict(run_config or {}),
            )
            for i in range(nodes)
        }
        # Flower's messages take the sender from here and refuse to be made without.
        TaskIdentity.task_id, TaskIdentity.run_id = 1, self._run.run_id
        TaskIdentity.node_id = SUPERLINK_NODE_ID

    @property
    def states(self) -> dict[int, RecordDict]:
        """What every node keeps, by partition."""
        return {i: context.state for i, context in enumerate(self._contexts.values())}

    def set_run(self, run: Run) -> None:
        """Set the run of the messages to come."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run of the messages."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message from the server."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes in order of their partitions."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the nodes work, one after another."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that are there, each once."""
        return [self._answers.pop(i) for i in message_ids if i in self._answers]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Let the nodes work, one after another; those not begun at `timeout` never answer."""
        end = float("inf") if timeout is None else time.monotonic() + timeout
        return self.pull_messages([self._push(m) for m in messages if time.monotonic() < end])

    def _push(self, message: Message) -> str:
        identifier = str(uuid4())
        message.metadata.__dict__["_message_id"] = identifier
        node = message.metadata.dst_node_id
        try:
            context = copy.deepcopy(self._contexts[node])
            answer = self._app(copy.deepcopy(message), context)
            self._contexts[node] = context
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            answer = Message(Error(RAISED, reason), reply_to=message)
        answer.metadata.__dict__["_message_id"] = str(uuid4())
        self._answers[identifier] = answer
        return identifier
