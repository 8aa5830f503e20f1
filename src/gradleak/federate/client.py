"""The client as a Flower app: it trains, protects its update and sends it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import Tensor

from gradleak.defenses import advanced
from gradleak.errors import InvalidInput
from gradleak.federate.federation import Federation, federation
from gradleak.federate.records import (
    ARRAYS,
    CONFIG,
    arrays_of,
    mixed,
    moved,
    reply_of,
    state_of,
    stored,
    tensors_of,
)
from gradleak.federate.secrecy import secret_generator
from gradleak.federate.settings import TrainSettings
from gradleak.federate.topology import metropolis
from gradleak.seeding import child
from gradleak.types import ModelState, Update

MEMORY = "gradleak.memory"
"""Record of `context.state` with what a protection remembers from round to round."""

ROUND, RATE, NODE = "server-round", "learning-rate", "node"
"""Entries of the configuration in a message; the last is the receiver's place in the graph."""


def client_app(settings: TrainSettings | None = None, *, mods: Sequence[Mod] = ()) -> ClientApp:
    """The app of every client.

    It answers with a gradient, or, where it trains locally, with its parameters after training, as
    Flower's own apps do.

    Args:
        settings: of the training; None reads them from `context.run_config`.
        mods: Flower's modifiers, the outermost first.
    """

    def agreed(context: Context) -> Federation:
        return federation(settings or TrainSettings.of(context.run_config))

    def summed(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Answer for a secure sum, where the settings ask for one."""
        secure = agreed(context).secure_sum
        return secure(message, context, call_next) if secure else call_next(message, context)

    app = ClientApp(mods=[*mods, summed])

    def place(context: Context) -> tuple[Federation, int]:
        made = agreed(context)
        client = int(context.node_config["partition-id"])
        if not 0 <= client < len(made.parts):
            raise InvalidInput(f"partition-id {client}: expected 0 to {len(made.parts) - 1}")
        return made, client

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Message, context: Context) -> Message:
        """Answer the server's parameters with an update."""
        began = time.process_time()
        made, client = place(context)
        state = state_of(tensors_of(message.content[ARRAYS]), made.initial)
        update, examples = _round(made, client, state, message.content[CONFIG], context)
        sent = update.values if update.kind == "gradient" else stored(moved(state, update, rate=1))
        seconds = time.process_time() - began
        return Message(reply_of(sent, examples=examples, seconds=seconds), reply_to=message)

    @app.train("gossip")  # type: ignore[untyped-decorator]
    def gossip(message: Message, context: Context) -> Message:
        """Answer the neighbours' parameters with one's own next ones."""
        began = time.process_time()
        made, client = place(context)
        config, records = message.content[CONFIG], message.content.array_records
        told = {int(k): state_of(tensors_of(v), made.initial) for k, v in records.items()}
        node = int(config[NODE])
        update, examples = _round(made, client, told[node], config, context)
        mean = mixed(told, metropolis(made.edges, node))
        following = stored(moved(mean, update, rate=float(config[RATE])))
        seconds = time.process_time() - began
        return Message(reply_of(following, examples=examples, seconds=seconds), reply_to=message)

    return app


def _round(
    made: Federation, client: int, state: ModelState, config: ConfigRecord, context: Context
) -> tuple[Update, int]:
    """One round's protected update and its number of examples; the memory stays in the context."""
    server_round = int(config[ROUND])
    batch = made.batch(client, server_round)
    mechanism = made.client_of(client, server_round, batch)
    memory: Mapping[str, Tensor] = tensors_of(context.state.get(MEMORY, ArrayRecord()))
    with torch.no_grad():
        draws = _draws(made.settings, client, server_round)
        update, memory = advanced(mechanism, state, batch, memory, generator=draws)
    if memory:
        context.state[MEMORY] = arrays_of(memory)
    return update, len(batch)


def _draws(settings: TrainSettings, client: int, server_round: int) -> torch.Generator:
    """A client's own randomness: seeded afresh by the operating system unless a test says how."""
    if settings.draws is None:
        return secret_generator()
    names = f"client/{client}/round/{server_round}"
    return child(torch.Generator().manual_seed(settings.draws), names)


app = client_app()
