"""A device that is not the CPU, on machines that have none.

Tensors here compute on the CPU and say that they lie on `ELSEWHERE`. What meets one of them
without being moved there raises, as on a GPU, and so does a generator of the CPU that is to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradleak.types import Exchange, Observation

ELSEWHERE = torch.device("meta")
"""Nothing but a name: PyTorch lets tensors claim this device wherever it was built."""

_MOVES = {"aten::_to_copy", "aten::copy_"}
_READS = {"aten::index", "aten::_index_put_impl_", "aten::index_put", "aten::index_put_"}
"""What may take indices of the CPU."""


class Moved(Tensor):
    """A tensor that lies elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Moved:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=ELSEWHERE,
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Moved({self.held})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Tensors(TorchFunctionMode):
    """Fills tensors made there from numbers: PyTorch leaves them empty, for want of memory."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == ELSEWHERE:
            return func(*args, **kwargs | {"device": "cpu"}).to(ELSEWHERE)
        if func is Tensor.new_tensor and isinstance(args[0], Moved) and "device" not in kwargs:
            return args[0].held.new_tensor(*args[1:], **kwargs).to(ELSEWHERE)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _index(args[1]), *args[2:])
        return func(*args, **kwargs)


class Elsewhere(TorchDispatchMode):
    """While it is entered, tensors can be moved to, and made on, `ELSEWHERE`."""

    def __enter__(self) -> Self:
        self.tensors = _Tensors()
        self.tensors.__enter__()
        # Parameters of modules that are moved stay the objects that optimisers hold.
        self.swaps = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(self.swaps)
        self.tensors.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def moved(seen: Observation) -> Observation:
    """What a server sees that computes elsewhere."""
    values = {k: v.to(ELSEWHERE) for k, v in seen.update.values.items()}
    exchange = Exchange(seen.state.to(ELSEWHERE), replace(seen.update, values=values))
    knowledge = seen.knowledge
    if knowledge.prior is not None:
        knowledge = replace(knowledge, prior=knowledge.prior.to(ELSEWHERE))
    return replace(seen, exchanges=(exchange,), knowledge=knowledge)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, given = func._schema.name, list(_tensors((*args, *kwargs.values())))
    moved = any(isinstance(x, Moved) for x in given)
    if moved and name not in _MOVES:
        left = [x for x in given if not isinstance(x, Moved) and x.ndim]
        if left and not (name in _READS and isinstance(args[0], Moved)):
            raise RuntimeError(f"{name}: a tensor {tuple(left[0].shape)} was left on the CPU")
    device = kwargs.get("device")
    if device is not None:
        moved = device == ELSEWHERE
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif name == "aten::copy_":
        moved = isinstance(args[0], Moved)
    if moved and any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values())):
        raise RuntimeError(f"{name}: a generator of the CPU was to draw elsewhere")
    out = func(*_each(_held, args), **{k: _each(_held, v) for k, v in kwargs.items()})
    if given and out is _held(given[0]):  # in place
        first = given[0]
        if isinstance(first, Moved) and first.shape != first.held.shape:
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                func(*args, **kwargs)
        return first
    return _each(Moved, out) if moved else out


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple | list):
        return type(value)(_each(change, v) for v in value)
    return value


def _index(value: Any) -> Any:
    """An index whose lists are tensors, of the CPU."""
    if isinstance(value, tuple):
        return tuple(_index(v) for v in value)
    return torch.tensor(value, dtype=None if value else int) if isinstance(value, list) else value


def _held(value: Tensor) -> Tensor:
    return value.held if isinstance(value, Moved) else value
