"""States and updates as Flower's records, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.models.weights import some
from gradleak.types import ModelState, Update

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
"""Names of the records in a message, as Flower's own strategies have them."""

EXAMPLES, SECONDS = "num-examples", "cpu-seconds"

NUMPY = "numpy.ndarray"
"""How Flower names arrays in NumPy's format."""


def arrays_of(values: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors by name as a record."""
    return ArrayRecord({k: _array(v.detach().cpu().numpy()) for k, v in values.items()})


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors in a record, by name; writable."""
    return {k: torch.from_numpy(_numpy(array)) for k, array in record.items()}


def _array(values: np.ndarray) -> Array:
    """What `Array(values)` is; NumPy's header is written once per form, not once per round."""
    data = _header(values.dtype.str, values.shape) + values.tobytes()
    return Array(str(values.dtype), values.shape, NUMPY, data)


def _numpy(array: Array) -> np.ndarray:
    """A copy of what `array.numpy()` is, without parsing the header that we would have written."""
    header = _header(np.dtype(array.dtype).str, tuple(array.shape))
    if array.stype != NUMPY or not array.data.startswith(header):
        return np.array(array.numpy())
    flat = np.frombuffer(array.data, dtype=array.dtype, offset=len(header))
    return flat.reshape(array.shape).copy()


@lru_cache(maxsize=256)
def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """NumPy's header of an array that lies row by row."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def stored(state: ModelState) -> dict[str, Tensor]:
    """What of a state a file or a message holds: parameters and persistent buffers."""
    kept = state.model.state_dict().keys()
    return {**state.params, **{k: v for k, v in state.buffers.items() if k in kept}}


def state_of(values: Mapping[str, Tensor], template: ModelState) -> ModelState:
    """The state that a message or a file holds.

    Raises:
        InvalidInput: names or shapes are not those of the template.
    """
    checked(values, stored(template), what="state")
    params = {k: values[k].to(v) for k, v in template.params.items()}
    buffers = {k: values.get(k, v) for k, v in template.buffers.items()}
    return replace(template, params=params, buffers=buffers)


def reply_of(values: Mapping[str, Tensor], *, examples: int, seconds: float) -> RecordDict:
    """What a client sends: a gradient, or a state after training."""
    metrics = MetricRecord({EXAMPLES: examples, SECONDS: seconds})
    return RecordDict({ARRAYS: arrays_of(values), METRICS: metrics})


def moved(state: ModelState, update: Update, *, rate: float) -> ModelState:
    """The state after an update: θ − rate · g, or θ + Δ."""
    scale = -rate if update.kind == "gradient" else 1.0
    params = {k: torch.add(v, update.values[k], alpha=scale) for k, v in state.params.items()}
    return replace(state, params=params)


def checked(
    values: Mapping[str, Tensor], like: Mapping[str, Tensor], *, what: str
) -> Mapping[str, Tensor]:
    """Values with the names and shapes of others, all of them finite.

    Raises:
        InvalidInput: they are not.
    """
    if values.keys() != like.keys():
        missing, extra = set(like) - set(values), set(values) - set(like)
        raise InvalidInput(f"{what}: missing {some(missing)}, unknown {some(extra)}")
    for k, v in values.items():
        if v.shape != like[k].shape:
            raise InvalidInput(f"{what} {k!r} is {tuple(v.shape)}: expected {tuple(like[k].shape)}")
        if v.is_floating_point() and not bool(v.isfinite().all()):
            raise InvalidInput(f"{what} {k!r} holds non-finite numbers")
    return values


def content_of(reply: Message | None) -> RecordDict:
    """What a client answered.

    Raises:
        InvalidInput: nothing, or an error.
    """
    if reply is None:
        raise InvalidInput("no answer")
    if reply.has_error():
        raise InvalidInput(reply.error.reason or f"error {reply.error.code}")
    return reply.content


def size(content: RecordDict) -> int:
    """Bytes of the records in a message."""
    return sum(
        _config_size(r) if isinstance(r, ConfigRecord) else r.count_bytes()
        for r in content.values()
    )


def _config_size(record: ConfigRecord) -> int:
    """What `count_bytes` says, which fails at empty words and lists."""
    return sum(
        len(name)
        + sum(
            len(v) if isinstance(v, str | bytes) else 1 if isinstance(v, bool) else 8
            for v in (value if isinstance(value, list) else [value])
        )
        for name, value in record.items()
    )


def mixed(states: Mapping[int, ModelState], weights: Mapping[int, float]) -> ModelState:
    """Σ_j w_j θ_j over states by number; buffers are those of the first."""
    first = states[next(iter(weights))]
    params = {
        k: sum((w * states[j].params[k] for j, w in weights.items()), torch.zeros_like(v))
        for k, v in first.params.items()
    }
    return replace(first, params=params)
