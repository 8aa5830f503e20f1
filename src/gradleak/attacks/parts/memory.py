"""Memory of an inner step: foretold by a dry run, and shared out when it runs short.

A dry run steps on tensors without storage ("meta") and follows the life of every storage that
PyTorch would have allocated. Scratch space inside single operations is not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradleak.types import Batch, DataSpec, Mechanism, ModelState, Update

T = TypeVar("T")

_META = torch.device("meta")

# PyTorch has no type of its own for these.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc", "ALLOC_FAILED")


def of_step(mechanism: Mechanism, state: ModelState, spec: DataSpec, *, batch_size: int) -> int:
    """Bytes at the peak of one trial's value and gradient, by plain double backward in float32.

    Args:
        mechanism: what the attacker differentiates through.
        state: broadcast state, on any device.
        spec: public form of the data.
        batch_size: examples of the claim.

    Raises:
        Exception: whatever the network raises on tensors that hold no numbers.
    """
    still, received, claim = _without_storage(mechanism, state, spec, batch_size)
    leaves = (claim.inputs.requires_grad_(), claim.labels.requires_grad_())

    def step() -> None:
        predicted = mechanism.predict(received, still, claim).values
        gaps = [(predicted[k] - received.values[k]).square().sum() for k in predicted]
        torch.autograd.grad(torch.stack(gaps).sum(), leaves, allow_unused=True)

    return peak(step)


def of_round(mechanism: Mechanism, state: ModelState, spec: DataSpec, *, batch_size: int) -> int:
    """Bytes at the peak of a client's round that nobody differentiates through; see `of_step`."""
    still, received, claim = _without_storage(mechanism, state, spec, batch_size)

    def step() -> None:
        with torch.no_grad():
            mechanism.predict(received, still, claim)

    return peak(step)


def _without_storage(
    mechanism: Mechanism, state: ModelState, spec: DataSpec, batch_size: int
) -> tuple[ModelState, Update, Batch]:
    still = state.to(torch.float32).to(_META)
    received = Update({k: torch.empty_like(v) for k, v in still.params.items()}, mechanism.kind)
    inputs = torch.empty((batch_size, *spec.shape), device=_META)
    return still, received, Batch(inputs, torch.empty((batch_size, spec.classes), device=_META))


def peak(run: Callable[[], object]) -> int:
    """Most bytes that storages made during `run` hold at one time."""
    ledger = _Ledger()
    with ledger:
        run()
    return ledger.peak


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of living storages; numbers asked of a tensor are answered by zero."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._meet((args, kwargs), new=False)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0
        out = func(*args, **(kwargs or {}))
        self._meet(out, new=True)
        return out

    def _meet(self, values: object, *, new: bool) -> None:
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key = storage._cdata
            if key in self._known:
                continue
            self._known.add(key)
            size = storage.nbytes() if new else 0
            self.held += size
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._part, key, size)

    def _part(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


@dataclass
class Limit:
    """Most trials that step together; halved whenever memory runs out."""

    trials: int = sys.maxsize

    def in_parts(self, evaluate: Callable[[slice], T], count: int, *, most: int) -> list[T]:
        """Evaluate rows 0 to `count` in parts of at most `most`; what is done stays done.

        Args:
            evaluate: takes the rows of one part.
            count: rows in all.
            most: rows per part, while memory lasts.

        Raises:
            Exception: what `evaluate` raises, and running out of memory with a single row.
        """
        done: list[T] = []
        begin = 0
        while begin < count:
            size = min(most, self.trials, count - begin)
            try:
                done.append(evaluate(slice(begin, begin + size)))
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not ran_out(error):
                    raise
                self.trials = size // 2
            else:
                begin += size
                continue
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # only now, when the failed graph has gone
        return done


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return any(words in text for words in _NO_MEMORY)
