"""Whether the closed forms cover a network, settled by trying them once per structure.

Every use of a parameter needs a rule, and value and gradient must agree with plain double backward
on random images, labels and updates: in the precision of the search, which needs no second copy of
the network, or else in float64. What was found holds for every network of the same
structure in this process: same modules with the same settings and shapes, whatever the weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.parts.carried import Evaluate
from gradleak.attacks.parts.plain import PlainFit
from gradleak.mechanisms.client import template
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.types import DataSpec, ModelState

_AGREEMENT = {torch.float32: 1e-4, torch.float64: 1e-7}
_APART = 13
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)

Together = Callable[[ModelState, dict[str, Tensor]], Evaluate]
"""Builds the fast evaluation of two trials of one target, given state and update."""

_known: dict[Hashable, bool] = {}


def settled(key: Hashable | None, find: Callable[[], bool]) -> bool:
    """`find()`, or what it gave for an equal key before; the key None is never remembered."""
    if key is not None and key in _known:
        return _known[key]
    answer = find()
    _give_memory_back()
    if key is not None:
        _known[key] = answer
    return answer


def _give_memory_back() -> None:
    """Hand freed pages to the system: glibc keeps those between the ones still in use."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def agrees(plain: PlainFit, together: Together, spec: DataSpec, size: int) -> bool:
    """Compare with plain double backward.

    Args:
        plain: the fit in question.
        together: the fast form of the same.
        spec: of the data.
        size: images per trial; two stand for more.
    """
    own = next(iter(plain.state.params.values())).dtype
    precisions = [torch.float64, *([torch.float32] if own == torch.float32 else [])]
    return any(_agrees_in(p, plain, together, spec, size) for p in reversed(precisions))


def _agrees_in(
    precision: torch.dtype, plain: PlainFit, together: Together, spec: DataSpec, size: int
) -> bool:
    state = plain.state.to(precision)
    close = _AGREEMENT[precision]
    device = next(iter(state.params.values())).device
    stream = torch.Generator().manual_seed(0)
    received = {k: _update(v, stream) for k, v in state.params.items()}
    inputs = _images(spec, min(size, 2), stream).to(device, precision)
    reference = PlainFit(
        plain.mechanism, state, plain.distance, [received], compared=plain.compared
    )
    outputs = torch.randn(2, *reference.outputs(inputs[0]).shape, generator=stream)
    labels = outputs.to(inputs).softmax(-1)
    wanted = [reference.evaluate(inputs[t], labels[t], 0, (True, True)) for t in range(2)]
    del reference
    _give_memory_back()
    values, gradients = together(state, received)(inputs, labels, (True, True))
    for t, (value, slopes) in enumerate(wanted):
        if not torch.allclose(values[t], value, rtol=close, atol=0):
            return False
        for g, w in zip(gradients, slopes, strict=True):
            if g is None or w is None:
                return False
            if not float((g[t] - w).norm()) <= close * float(w.norm()):
                return False
    return True


def _update(like: Tensor, stream: torch.Generator) -> Tensor:
    """Random numbers of this shape, most of them several times over, in little memory."""
    count = like.shape[0] if like.ndim else 1
    row = like.numel() // count
    span = row + _APART * (count - 1)
    numbers = torch.randn(span, generator=stream, dtype=like.dtype) / like.numel() ** 0.5
    update: Tensor = numbers.to(like.device).unfold(0, row, _APART).view(like.shape)
    return update


def structure(state: ModelState, client: FedSGD) -> Hashable | None:
    """All that decides how a client's network uses its parameters; None if it cannot be told."""
    model = template(state.model, client.batch_norm)
    first: dict[int, str] = {}
    for name, value in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        first.setdefault(id(value), name)
    try:
        modules = tuple(
            (name, type(module), _settings(vars(module), first))
            for name, module in model.named_modules(remove_duplicate=False)
        )
        key = (
            modules,
            _settings(state.params, first),
            _settings(state.buffers, first),
            _setting(client.loss, first),
        )
        hash(key)
    except TypeError:
        return None
    return key


def _settings(values: Mapping[str, Any], first: Mapping[int, str]) -> Hashable:
    return tuple((name, _setting(value, first)) for name, value in values.items())


def _setting(value: Any, first: Mapping[int, str]) -> Hashable:
    """Something hashable that tells settings apart.

    Raises:
        TypeError: the setting is of a kind that may hide anything.
    """
    if isinstance(value, Tensor):
        return ("tensor", first.get(id(value)), tuple(value.shape), value.dtype, value.device)
    if isinstance(value, nn.Module):
        return ("module", type(value).__qualname__)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, _NAMED):
        return value
    if isinstance(value, Mapping):
        return type(value), _settings(value, first)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), _settings(vars(value), first)
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), tuple(_setting(v, first) for v in value)
    raise TypeError(f"{type(value).__name__} is not a plain setting")


def _images(spec: DataSpec, size: int, stream: torch.Generator) -> Tensor:
    low, high = spec.bounds
    draws = torch.rand((2, size, *spec.shape), generator=stream, dtype=torch.float64)
    return low + (high - low) * draws
