"""Activations and errors of every example, layer by layer, below a head that is separated.

Let z = A(a; W) + c be a convolution or linear layer, h = relu(z) known for every example, and
d = ∂L/∂z known, zero where the unit is inactive. Then both

    ∂L/∂W = Σ_i  d_i ⋆ a_i        and        A(a_i; W) = h_i − c  where h_i is active

are linear in the layer's inputs a_i. Where these equations outnumber the unknowns, conjugate
gradients find a; its zeros are the pattern of the ReLU below, and ∂L/∂a = Aᵀ(d; W) on that pattern
is the error there: the next layer's turn. R-GAP (Zhu & Blaschko, ICLR 2021) solves such equations
for one example; a separated head makes them hold for a batch.

Nothing is taken on trust: a layer counts as peeled only if the solution explains the update and is
non-negative up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from gradleak.attacks.closed_form.disaggregate import Separated
from gradleak.attacks.parts.smoothing import SmoothMaxPool, SmoothReLU, called_module, keeps_values
from gradleak.types import Observation

_OVERDETERMINED = 1.05
_ITERATIONS = 1500
_CONVERGED = 1e-24
_EXPLAINED = 1e-4
_NEGATIVE = 1e-2


@dataclass(frozen=True)
class Place:
    """What a linear layer reads, and the network below it.

    Attributes:
        below: the network up to there, (b, *shape) to (b, width). Where a ReLU is read, up to what
            enters it (pooled, if a max-pooling follows it).
        reader: name of the layer that reads it.
        writer: name of the layer that writes what enters the ReLU; None where something else does.
        rectified: whether a ReLU is read.
    """

    below: nn.Module
    reader: str
    writer: str | None
    rectified: bool = True


@dataclass(frozen=True)
class Activations:
    """What is known of every example at a place.

    Attributes:
        features: (b, width) what is read; after a ReLU exactly zero where inactive.
        cotangents: (b, width) derivative of the loss in what `below` gives.
    """

    features: Tensor
    cotangents: Tensor


def places(network: nn.Module) -> list[Place]:
    """Places of a network that `smoothing.swapped` gave, from the head down, as far as they chain.

    Empty where the network does not end in ReLU, an optional max-pooling and a linear head.
    """
    if not isinstance(network, fx.GraphModule):
        return []
    found: list[Place] = []
    reader = _output(network).args[0]
    while isinstance(reader, fx.Node) and _linear(called_module(reader, network)):
        place = _place(network, reader)
        if place is None:
            break
        found.append(place)
        if place.writer is None:
            break
        reader = next(n for n in network.graph.nodes if n.target == place.writer)
    return found


def head_place(network: nn.Module) -> Place | None:
    """What the linear head of a network that `smoothing.swapped` gave reads, whatever it is."""
    if not isinstance(network, fx.GraphModule):
        return None
    head = _output(network).args[0]
    if not isinstance(head, fx.Node) or not isinstance(called_module(head, network), nn.Linear):
        return None
    entry = head.args[0]
    if not isinstance(entry, fx.Node):
        return None
    return Place(_ending(copy.deepcopy(network), entry.name), str(head.target), None, False)


def at_head(seen: Observation, separated: Separated, place: Place) -> Activations:
    """What a separated head says of the example's inputs and errors there."""
    head = _double(seen.state.params[f"{place.reader}.weight"])
    errors = separated.residuals @ head / len(separated.features)
    lit = separated.features > 0 if place.rectified else torch.ones_like(errors)
    return Activations(separated.features, errors * lit)


def peel(
    seen: Observation, separated: Separated, chain: Sequence[Place]
) -> tuple[int, Activations]:
    """Index of the deepest place that the update determines, and what is known there.

    Args:
        seen: a noise-free gradient of one batch.
        separated: its head, example by example.
        chain: as `places` gives it; not empty.
    """
    values, params = seen.update.values, seen.state.params
    known = at_head(seen, separated, chain[0])
    shapes = _input_shapes(seen, [p.writer for p in chain if p.writer])
    for depth, place in enumerate(chain[:-1]):
        name = str(place.writer)  # only the last place may have none
        if f"{name}.weight" not in params:
            return depth, known
        layer = chain[0].below.get_submodule(name)
        weight, gradient = (_double(of[f"{name}.weight"]) for of in (params, values))
        bias = _double(params[f"{name}.bias"]) if f"{name}.bias" in params else None
        problem = _Layer(layer, weight, bias, gradient, shapes[name])
        deeper = problem.inputs(known)
        if deeper is None:
            return depth, known
        known = deeper
    return len(chain) - 1, known


def _double(value: Tensor) -> Tensor:
    return value.detach().double().cpu()


class _Layer:
    """One linear layer whose inputs are sought."""

    def __init__(
        self,
        layer: nn.Module,
        weight: Tensor,
        bias: Tensor | None,
        gradient: Tensor,
        shape: tuple[int, ...],
    ) -> None:
        self.weight, self.gradient, self.shape = weight, gradient, shape
        self.layer = layer if isinstance(layer, nn.Conv2d) else None
        self.bias = 0.0 if bias is None else bias.view(-1, *[1] * (len(shape) - 1))

    def outputs(self, a: Tensor, weight: Tensor) -> Tensor:
        """Linear in `a` and in `weight`; the two maps below are its transposes."""
        if self.layer is None:
            return a @ weight.T
        c = self.layer
        return conv2d(a, weight, None, c.stride, c.padding, c.dilation, c.groups)

    def weight_gradient(self, a: Tensor, d: Tensor) -> Tensor:
        if self.layer is None:
            return d.T @ a
        c = self.layer
        found: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            a, self.weight.shape, d, c.stride, c.padding, c.dilation, c.groups
        )
        return found

    def input_gradient(self, weight: Tensor, d: Tensor) -> Tensor:
        if self.layer is None:
            return d @ weight
        c, shape = self.layer, (len(d), *self.shape)
        found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            shape, weight, d, c.stride, c.padding, c.dilation, c.groups
        )
        return found

    def inputs(self, known: Activations) -> Activations | None:
        """The layer's inputs and the derivatives of the loss in them; None if not determined.

        Args:
            known: at the layer's outputs.
        """
        size = len(known.features)
        like = self.outputs(torch.zeros((size, *self.shape), dtype=torch.float64), self.weight)
        features, errors = known.features.view_as(like), known.cotangents.view_as(like)
        unknown = size * self.weight.new_empty(self.shape).numel()
        equations = self.gradient.numel() + int((features > 0).sum())
        if equations < _OVERDETERMINED * unknown or not self.gradient.any():
            return None
        a, gap = self._least_squares(features, errors)
        noise = 3 * float(-a.min().clamp(max=0)) + 1e-9 * float(a.max())
        if gap.norm() > _EXPLAINED * self.gradient.norm() or noise > _NEGATIVE * float(a.max()):
            return None
        found = torch.where(a > noise, a, torch.zeros_like(a))
        below = self.input_gradient(self.weight, errors)
        return Activations(found.flatten(1), (below * (found > 0)).flatten(1))

    def _least_squares(self, features: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs by conjugate gradients on the normal equations, and the gradient not explained."""
        lit = features > 0
        first, second = 1 / self.gradient.norm(), 1 / features.norm()

        def forward(a: Tensor) -> tuple[Tensor, Tensor]:
            outputs = lit * self.outputs(a, self.weight)
            return first * self.weight_gradient(a, d), second * outputs

        def adjoint(gradient: Tensor, outputs: Tensor) -> Tensor:
            by_outputs = self.input_gradient(self.weight, lit * outputs)
            total: Tensor = first * self.input_gradient(gradient, d) + second * by_outputs
            return total

        wanted = (first * self.gradient, second * lit * (features - self.bias))
        a, left = conjugate_gradients(forward, adjoint, wanted)
        return a, left / first


def conjugate_gradients(
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
    adjoint: Callable[[Tensor, Tensor], Tensor],
    wanted: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """min ‖F a − w‖² from a = 0, by CGLS (Björck, Numerical Methods for Least Squares Problems).

    Returns:
        a, and the first block of w − F a.
    """
    left = list(wanted)
    r = adjoint(left[0], left[1])
    a, p, rho = torch.zeros_like(r), r.clone(), float((r * r).sum())
    enough = _CONVERGED * rho
    for _ in range(_ITERATIONS):
        if rho <= enough:
            break
        q = forward(p)
        step = rho / sum(float((part * part).sum()) for part in q)
        a += step * p
        left = [part - step * change for part, change in zip(left, q, strict=True)]
        r = adjoint(left[0], left[1])
        rho, before = float((r * r).sum()), rho
        p = r + (rho / before) * p
    return a, left[0]


def _output(network: fx.GraphModule) -> fx.Node:
    found: fx.Node = next(n for n in network.graph.nodes if n.op == "output")
    return found


def _linear(layer: nn.Module | None) -> bool:
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def _place(network: fx.GraphModule, reader: fx.Node) -> Place | None:
    """The ReLU that `reader` reads, through reshapes and at most one max-pooling."""
    path = [reader]
    node, pooled = reader.args[0], False
    while isinstance(node, fx.Node):
        layer = called_module(node, network)
        if isinstance(layer, SmoothReLU):
            break
        if isinstance(layer, SmoothMaxPool) and not pooled:
            pooled = True
        elif not keeps_values(node, network):
            return None
        path.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    relu = called_module(node, network)
    if not isinstance(relu, SmoothReLU) or relu.slope or relu.cap is not None:
        return None
    if any(len(n.users) != 1 for n in path[1:]):
        return None
    entry = node.args[0]
    writer = entry if isinstance(entry, fx.Node) and not pooled else None
    named = writer is not None and _linear(called_module(writer, network))
    return Place(
        _cut(network, node.name, path[1].name if len(path) > 1 else node.name),
        str(reader.target),
        str(writer.target) if writer is not None and named else None,
    )


def _cut(network: fx.GraphModule, relu: str, last: str) -> fx.GraphModule:
    """The network that ends, flattened, at node `last`, without the ReLU."""
    short = copy.deepcopy(network)
    nodes = {n.name: n for n in short.graph.nodes}
    entry = nodes[relu].args[0]
    nodes[relu].replace_all_uses_with(entry)
    return _ending(short, entry.name if last == relu else last)


def _ending(short: fx.GraphModule, last: str) -> fx.GraphModule:
    """`short`, changed to end, flattened, at node `last`."""
    nodes = {n.name: n for n in short.graph.nodes}
    output = _output(short)
    with short.graph.inserting_before(output):
        output.args = (short.graph.call_function(torch.flatten, (nodes[last], 1)),)
    short.graph.eliminate_dead_code()
    short.delete_all_unused_submodules()
    short.recompile()
    return short


def _input_shapes(seen: Observation, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shape of one example where it enters each of these layers."""
    model = copy.deepcopy(seen.state.model).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:

        def note(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            shapes[name] = tuple(arguments[0].shape[1:])

        model.get_submodule(name).register_forward_pre_hook(note)
    reference = next(model.parameters())
    with torch.no_grad():
        model(torch.zeros((1, *seen.data.shape), dtype=reference.dtype, device=reference.device))
    return shapes
