"""One client's loss gradient as a pure function of parameters, inputs and labels.

    g(θ; x, y) = ∇_θ (1/b) Σ_i ℓ(f_θ(x_i), y_i)

Differentiable in x and in soft y, and transformable by `torch.func.vmap` over trials.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from gradleak.errors import InvalidInput
from gradleak.types import Batch, ModelState

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (b, classes), labels (b,) or (b, classes)) -> mean loss over the batch, 0-dim."""

BatchNormMode = Literal["eval", "train"]
"""Whether the client normalises by the broadcast running statistics or by its own batch."""

T = TypeVar("T")

_templates: weakref.WeakKeyDictionary[nn.Module, dict[BatchNormMode, nn.Module]] = (
    weakref.WeakKeyDictionary()
)


def template(model: nn.Module, batch_norm: BatchNormMode) -> nn.Module:
    """Return a frozen copy of `model` that never writes to its buffers.

    Dropout is off. With `batch_norm="train"` every batch-normalisation layer uses the statistics
    of the batch it sees and keeps no running estimate, so calls stay pure. Parameters, which are
    never read, stay where the model has them.
    """
    known = _templates.setdefault(model, {})
    if batch_norm not in known:
        clone = copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
        if batch_norm == "train":
            for name, layer in list(clone.named_modules()):
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    own = _OwnStatistics(layer)
                    if not name:
                        clone = own
                    else:
                        clone.set_submodule(name, own)
        known[batch_norm] = clone
    return known[batch_norm]


class _OwnStatistics(nn.Module):
    """Batch normalisation by the batch at hand, spelled out.

    PyTorch's fused layer gives wrong second derivatives under `vmap` when it uses batch statistics
    (seen in 2.13), and writes to running estimates.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        dims = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x, dims, unbiased=False, keepdim=True)
        out = (x - mean) * torch.rsqrt(variance + self.eps)
        if self.weight is None:
            return out
        shape = [1, -1] + [1] * (x.ndim - 2)
        return out * self.weight.reshape(shape) + self.bias.reshape(shape)


def normalises(model: nn.Module) -> bool:
    """Whether the network has a batch-normalisation layer."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def own_buffers(model: nn.Module, state: ModelState) -> dict[str, Tensor]:
    """The fixed tensors of `state` that `model`, a template or a part of one, has a place for."""
    own = {k for k, _ in model.named_buffers()} | {k for k, _ in model.named_parameters()}
    return {k: v for k, v in state.buffers.items() if k in own}


Call = Callable[..., Tensor]
"""A network as a function of its inputs."""


def client_gradient(
    state: ModelState,
    params: Mapping[str, Tensor],
    objective: Callable[[Call], Tensor],
    *,
    batch_norm: BatchNormMode,
) -> dict[str, Tensor]:
    """Gradient at `params` of what a client minimises, one tensor per parameter.

    Args:
        state: broadcast state.
        params: where the gradient is taken.
        objective: (network) → loss, 0-dimensional.
        batch_norm: statistics the client normalises by.
    """
    model = template(state.model, batch_norm)
    fixed = own_buffers(model, state)

    def loss(free: dict[str, Tensor]) -> Tensor:
        return objective(lambda *given: torch.func.functional_call(model, (free, fixed), given))

    return torch.func.grad(loss)(dict(params))  # type: ignore[no-any-return]


class Local:
    """What one local step takes the gradient of."""

    loss: Loss
    batch_norm: BatchNormMode

    def objective(self, network: Call, batch: Batch) -> Tensor:
        """Loss of a batch under a network, 0-dimensional."""
        return self.loss(network(batch.inputs), batch.labels)

    def settled(self, batch: Batch, *, generator: torch.Generator) -> tuple[Self, Batch]:
        """The client once it has drawn what its loss draws, and its batch with these draws."""
        return self, batch

    def foreseen(self, batch: Batch) -> tuple[Self, Batch]:
        """The same for the draws that predictions go by."""
        return self, batch

    def determined(self, batch_size: int) -> bool:
        """Whether predictions rest on the batch alone, but for the order of its examples."""
        return True

    def drawn(self, batch: Batch, *, generator: torch.Generator) -> Callable[[Call], Tensor]:
        """Loss of a batch as a function of the network, once the client has drawn for it."""
        client, given = self.settled(batch, generator=generator)
        return lambda network: client.objective(network, given)

    def gradient(
        self, state: ModelState, params: Mapping[str, Tensor], batch: Batch
    ) -> dict[str, Tensor]:
        """Gradient of the objective of `batch` at `params`, one tensor per parameter."""
        return client_gradient(
            state, params, lambda to: self.objective(to, batch), batch_norm=self.batch_norm
        )


def batch_norm_statistics(state: ModelState, inputs: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and biased variance at the input of every batch-normalisation layer, by layer name.

    Measured in a forward pass that itself normalises by batch statistics, differentiably.

    Args:
        state: broadcast state.
        inputs: (b, *shape).

    Returns:
        (mean, variance), each (channels,), in forward order; empty without such layers.
    """

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        return x.mean(dims), x.var(dims, unbiased=False)

    return _at_normalisations(state, inputs, statistics)


def _at_normalisations(
    state: ModelState, inputs: Tensor, read: Callable[[Tensor], T]
) -> dict[str, T]:
    """What `read` makes of the input of every batch-normalisation layer, by layer name."""
    model = template(state.model, "train")
    found: dict[str, T] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found[name] = read(arguments[0])

        return hook

    handles = [
        layer.register_forward_pre_hook(record(name))
        for name, layer in model.named_modules()
        if isinstance(layer, _OwnStatistics)
    ]
    if not handles:
        return {}
    fixed = own_buffers(model, state)
    try:
        torch.func.functional_call(model, (dict(state.params), fixed), (inputs,))
    finally:
        for handle in handles:
            handle.remove()
    return found


def running_statistics(state: ModelState) -> dict[str, tuple[Tensor, Tensor]]:
    """The running (mean, variance) that the broadcast state holds, by layer name."""
    suffix = ".running_mean"
    names = [k.removesuffix(suffix) for k in state.buffers if k.endswith(suffix)]
    return {n: (state.buffers[n + suffix], state.buffers[n + ".running_var"]) for n in names}


def returned_statistics(
    state: ModelState, returned: Mapping[str, Tensor], *, batch_size: int, shape: tuple[int, ...]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Exact statistics of a batch, from running estimates before and after its one local step.

        r' = (1 − m) r + m s  ⇒  s = (r' − (1 − m) r) / m

    with m the layer's momentum, or 1 over the number of batches where it has none. PyTorch's
    variances are unbiased; those returned here are not, as `batch_norm_statistics` has them.

    Args:
        state: broadcast state.
        returned: fixed tensors as the client has them after the step, by name.
        batch_size: b.
        shape: of one input.

    Returns:
        (mean, biased variance) by layer name; empty where no estimate moved.

    Raises:
        InvalidInput: the client made more than one step, whose batches cannot be told apart.
    """
    layers = dict(state.model.named_modules())
    like = next(iter(state.params.values()))
    with torch.no_grad():
        entries = _at_normalisations(
            state, like.new_zeros((batch_size, *shape)), lambda x: x.numel() // x.shape[1]
        )
    found = {}
    for name, before in running_statistics(state).items():
        keys = (f"{name}.running_mean", f"{name}.running_var")
        if not all(key in returned for key in keys):
            continue
        after = tuple(returned[key].to(like) for key in keys)
        if all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
            continue
        counter = f"{name}.num_batches_tracked"
        tracked = returned.get(counter, state.buffers[counter] + 1)
        steps = int(tracked) - int(state.buffers[counter])
        if steps != 1:
            raise InvalidInput(
                f"returned buffers of {name!r} went through {steps} steps: expected 1, the "
                "batches of several cannot be told apart"
            )
        momentum = layers[name].momentum
        m = 1 / int(tracked) if momentum is None else float(momentum)
        mean, variance = (b + (a - b) / m for a, b in zip(after, before, strict=True))
        found[name] = (mean, variance * (entries[name] - 1) / entries[name])
    return found


def check_positive(**values: float) -> None:
    """Raise `InvalidInput` naming the first value that is not a positive finite number."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InvalidInput(f"{name}={value}: expected a positive number")
