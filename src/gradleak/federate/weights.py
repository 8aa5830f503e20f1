"""The numbers that a Flower message carries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from torch import Tensor

from gradleak.errors import InvalidInput

Weights = dict[str, Tensor]


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
    return name, dict(record.to_torch_state_dict())


def written(weights: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as a record, in their order."""
    return ArrayRecord(OrderedDict((k, v.detach().cpu()) for k, v in weights.items()))
