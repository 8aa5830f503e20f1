"""The numbers that a Flower message carries."""

from __future__ import annotations

from flwr.app import Message, MessageType, RecordDict
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.federate.records import tensors_of

Weights = dict[str, Tensor]

STATISTICS = (".running_mean", ".running_var")
"""Ends of the names of normalisation layers' running estimates: no part of an update."""


def trains(message: Message) -> bool:
    """Whether a message asks for training, under any name of the app's own."""
    kind: str = message.metadata.message_type
    return bool(kind.partition(".")[0] == MessageType.TRAIN)


def read(content: RecordDict, *, where: str) -> tuple[str, Weights]:
    """The name and the tensors of the one `ArrayRecord` in `content`.

    Raises:
        InvalidInput: there is none, or several.
    """
    records = dict(content.array_records)
    if len(records) != 1:
        raise InvalidInput(f"{where} holds {len(records)} ArrayRecords: expected one")
    ((name, record),) = records.items()
    return name, tensors_of(record)
