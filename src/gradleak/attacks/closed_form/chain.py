"""A network as a chain of linear layers and invertible activations, read from its graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gradleak.attacks.closed_form.affine import probes, undoing
from gradleak.attacks.parts.smoothing import called_module, keeps_values
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import DataSpec, ModelState

Pair = tuple[Tensor, Tensor]
Inverse = Callable[[Tensor], Pair]
"""a = φ(z) -> z and φ′(z); non-finite where a is outside φ's range."""


@dataclass(frozen=True)
class Link:
    """A linear layer and the activation that follows it.

    Attributes:
        name: of the layer.
        layer: `nn.Linear` or `nn.Conv2d`.
        inverse: of the activation; None behind the last layer.
        shape: of one example where it enters the layer.
    """

    name: str
    layer: nn.Linear | nn.Conv2d
    inverse: Inverse | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """The links from the first to the last, and the way back from the first one's input.

    Attributes:
        links: in the order of the forward pass.
        undo: what enters the first layer -> the network's input, an elementwise affine map.
    """

    links: tuple[Link, ...]
    undo: Callable[[Tensor], Tensor]


def chain_of(state: ModelState, data: DataSpec) -> Chain | str:
    """The network as a chain, or what it holds that no chain does."""
    model = template(state.model, "eval").to(torch.float64)
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # a user's forward may raise anything
        return f"the network cannot be traced: {type(error).__name__}"
    found: list[tuple[str, nn.Linear | nn.Conv2d, Inverse | None]] = []
    inverse: Inverse | None = None
    (end,) = (node for node in traced.graph.nodes if node.op == "output")
    node = end.args[0]
    while isinstance(node, fx.Node) and node.op != "placeholder":
        layer = called_module(node, traced)
        if len(node.users) != 1:
            return f"{node.name!r} is read twice: the network is no chain"
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fault = _fault(layer, str(node.target))
            if fault:
                return fault
            found.append((str(node.target), layer, inverse))
            inverse = None
            if _only_affine_below(node, traced):
                break
        elif not keeps_values(node, traced):
            known = _inverse(node, layer)
            if known is None or inverse is not None:
                return f"{_what(node, layer)} cannot be inverted"
            if not found:
                return f"the network ends in {_what(node, layer)}, not in a linear layer"
            inverse = known
        node = node.args[0] if node.args else None
    if not found:
        return "the network has no linear layer"
    return _placed(model, state, data, found[::-1])


def _fault(layer: nn.Linear | nn.Conv2d, name: str) -> str:
    if isinstance(layer, nn.Conv2d) and (
        layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    ):
        return f"{name!r} is no plain convolution (groups, padding mode)"
    return ""


def _only_affine_below(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether nothing but arithmetic with constants stands between the input and this layer."""
    entry = node.args[0]
    while isinstance(entry, fx.Node) and entry.op != "placeholder":
        if entry.op == "call_module" and not keeps_values(entry, traced):
            return False
        if _inverse(entry, called_module(entry, traced)) is not None:
            return False
        entry = entry.args[0] if entry.args else None
    return True


def _placed(
    model: nn.Module,
    state: ModelState,
    data: DataSpec,
    found: list[tuple[str, nn.Linear | nn.Conv2d, Inverse | None]],
) -> Chain | str:
    """Shapes by a pass of constant and random inputs, and the affine map before the first layer."""
    entered: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: entered.__setitem__(name, given[0].detach())

    handles = [
        model.get_submodule(name).register_forward_pre_hook(note(name)) for name, _, _ in found
    ]
    numbers = state.to(torch.device("cpu")).to(torch.float64)
    fixed = own_buffers(model, numbers)
    first, reached = found[0][0], []
    try:
        with torch.no_grad():
            for x in probes(data):
                torch.func.functional_call(model, (dict(numbers.params), fixed), (x,))
                reached.append(entered[first])
    finally:
        for handle in handles:
            handle.remove()
    undo = undoing(first, reached, data)
    if isinstance(undo, str):
        return undo
    links = tuple(
        Link(name, layer, inverse, tuple(entered[name].shape[1:])) for name, layer, inverse in found
    )
    return Chain(links, undo)


def _what(node: fx.Node, layer: nn.Module | None) -> str:
    return type(layer).__name__ if layer is not None else str(node.target)


def _inverse(node: fx.Node, layer: nn.Module | None) -> Inverse | None:
    """The inverse of an activation that is one-to-one, else None."""
    match layer:
        case nn.LeakyReLU() if layer.negative_slope > 0:
            return _leaky(layer.negative_slope)
        case nn.Tanh():
            return _tanh
        case nn.Sigmoid():
            return _sigmoid
        case nn.Softplus() if layer.beta == 1:
            return _softplus
        case nn.ELU():
            return _elu(float(layer.alpha))
    if layer is not None or node.op not in ("call_function", "call_method"):
        return None
    options: Mapping[str, Any] = node.kwargs
    if node.target in (F.leaky_relu, torch.nn.functional.leaky_relu_):
        slope = float(options.get("negative_slope", [*node.args[1:], 0.01][0]))
        return _leaky(slope) if slope > 0 else None
    return {
        torch.tanh: _tanh,
        F.tanh: _tanh,
        "tanh": _tanh,
        torch.sigmoid: _sigmoid,
        F.sigmoid: _sigmoid,
        "sigmoid": _sigmoid,
    }.get(node.target)


def _leaky(slope: float) -> Inverse:
    def inverse(a: Tensor) -> Pair:
        slopes = torch.where(a < 0, slope, 1.0).to(a)
        return a / slopes, slopes

    return inverse


def _elu(alpha: float) -> Inverse:
    def inverse(a: Tensor) -> Pair:
        below = torch.log1p(torch.where(a < 0, a, torch.zeros_like(a)) / alpha)
        return torch.where(a < 0, below, a), torch.where(a < 0, a + alpha, torch.ones_like(a))

    return inverse


def _tanh(a: Tensor) -> Pair:
    return torch.atanh(a), 1 - a**2


def _sigmoid(a: Tensor) -> Pair:
    return torch.logit(a), a * (1 - a)


def _softplus(a: Tensor) -> Pair:
    return a + torch.log(-torch.expm1(-a)), -torch.expm1(-a)


def unknowns(link: Link) -> int:
    """Numbers that enter the layer."""
    return math.prod(link.shape)
