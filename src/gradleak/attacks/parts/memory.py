"""Memory of an inner step: foretold by a dry run, and shared out when it runs short.

A dry run steps on tensors without storage ("meta") and follows the life of every storage that
PyTorch would have allocated. Scratch space inside single operations is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradleak.types import Batch, DataSpec, Mechanism, ModelState, Update

_META = torch.device("meta")


def of_step(
    mechanism: Mechanism, state: ModelState, spec: DataSpec, *, batch_size: int, dtype: torch.dtype
) -> int:
    """Bytes at the peak of one trial's value and gradient, by plain double backward.

    Args:
        mechanism: what the attacker differentiates through.
        state: broadcast state, on any device.
        spec: public form of the data.
        batch_size: examples of the claim.
        dtype: precision of the search.

    Raises:
        Exception: whatever the network raises on tensors that hold no numbers.
    """
    still = ModelState(state.model, state.params, state.buffers).to(dtype).to(_META)
    received = Update({k: torch.empty_like(v) for k, v in still.params.items()}, mechanism.kind)
    inputs = torch.empty((batch_size, *spec.shape), dtype=dtype, device=_META)
    logits = torch.empty((batch_size, spec.classes), dtype=dtype, device=_META)
    leaves = (inputs.requires_grad_(), logits.requires_grad_())

    def step() -> None:
        claim = Batch(leaves[0], leaves[1].softmax(1))
        predicted = mechanism.predict(received, still, claim).values
        gaps = [(predicted[k] - received.values[k]).square().sum() for k in predicted]
        torch.autograd.grad(torch.stack(gaps).sum(), leaves)

    return peak(step)


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
