"""The first layer of a network, and the way from its input back to the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.attacks.closed_form.affine import probes, undoing
from gradleak.attacks.parts.client import takes_data_alone
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import DataSpec, ModelState


@dataclass(frozen=True)
class FirstLayer:
    """What the data enter first.

    Attributes:
        name: of the layer.
        layer: the template's module; its own numbers are not the state's.
        undo: its input for one example -> that example, an elementwise affine map.
    """

    name: str
    layer: nn.Module
    undo: Callable[[Tensor], Tensor]

    @property
    def weight(self) -> str:
        """Name of its weight among the parameters."""
        return f"{self.name}.weight".lstrip(".")

    @property
    def bias(self) -> str:
        """Name of its bias."""
        return f"{self.name}.bias".lstrip(".")


def first_layer(state: ModelState, data: DataSpec) -> FirstLayer | str:
    """The first layer with parameters, or why its input is not the data."""
    if not takes_data_alone(state.model):
        return "the network is called with more than the data"
    model = template(state.model, "eval").to(torch.float64)
    numbers = state.to(torch.device("cpu")).to(torch.float64)
    fixed = own_buffers(model, numbers)
    calls: list[tuple[str, nn.Module, Tensor]] = []

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, arguments: calls.append((name, layer, arguments[0].detach()))

    handles = [
        layer.register_forward_pre_hook(recorder(name))
        for name, layer in model.named_modules()
        if any(True for _ in layer.parameters(recurse=False)) and not any(layer.children())
    ]
    try:
        reached = []
        for x in probes(data):
            calls.clear()
            torch.func.functional_call(model, (dict(numbers.params), fixed), (x,))
            reached.append(calls[0])
    finally:
        for handle in handles:
            handle.remove()
    name, layer, _ = reached[0]
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return f"the first layer {name!r} is {type(layer).__name__}, not linear"
    undo = undoing(name, [h for _, _, h in reached], data)
    return undo if isinstance(undo, str) else FirstLayer(name, layer, undo)


def first_linear(state: ModelState, data: DataSpec) -> FirstLayer | str:
    """The first layer if it is linear with a bias, or why it is not."""
    first = first_layer(state, data)
    if isinstance(first, str):
        return first
    if not isinstance(first.layer, nn.Linear):
        return f"the first layer {first.name!r} is {type(first.layer).__name__}, not linear"
    if first.bias not in state.params:
        return (
            f"the first layer {first.name!r} has no bias: scale and sign of its input stay unknown"
        )
    return first
