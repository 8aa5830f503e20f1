"""The attacker's smooth copy of a network with kinks.

    relu(a) → log(1 + exp(s a)) / s        max(a_1, …, a_k) → log(Σ exp(s a_i)) / s

with s = β / (standard deviation of a on images drawn by the attacker). The copy has the parameters
of the network under the same names, and tends to the network as β grows.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from gradleak.attacks.parts.client import takes_data_alone
from gradleak.errors import NotApplicable
from gradleak.types import DataSpec, ModelState

_NAMES = """
    relu relu_ leaky_relu leaky_relu_ relu6 hardtanh hardtanh_ prelu rrelu hardswish
    hardsigmoid hardshrink softshrink threshold threshold_ max_pool1d max_pool2d max_pool3d
    max_pool2d_with_indices adaptive_max_pool2d clamp clamp_ clamp_min clamp_max clip abs
    maximum minimum amax amin
"""
KINKS = frozenset(_NAMES.split())
"""Names of torch functions whose derivative jumps."""

_PUBLIC_IMAGES = 8


class Smooth(nn.Module):
    """A function with kinks, or its smooth version once a sharpness is set."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = 1.0
        self.beta: float | None = None

    @property
    def sharpness(self) -> float | None:
        return None if self.beta is None else self.beta / self.spread


class SmoothReLU(Smooth):
    """max(a, slope · a), capped at `cap` if there is one."""

    def __init__(self, slope: float = 0.0, cap: float | None = None) -> None:
        super().__init__()
        self.slope, self.cap = slope, cap

    def _ramp(self, a: Tensor) -> Tensor:
        sharp = self.sharpness
        return F.relu(a) if sharp is None else F.softplus(a, sharp, 40)

    def forward(self, a: Tensor) -> Tensor:
        out = self._ramp(a)
        if self.cap is not None:
            out = out - self._ramp(a - self.cap)
        return self.slope * a + (1 - self.slope) * out if self.slope else out


class SmoothMaxPool(Smooth):
    """The largest entry of each window, or the log-sum-exp of the window."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.window = _pair(pool.kernel_size)
        self.stride, self.padding = _pair(pool.stride), _pair(pool.padding)
        self.ceil = pool.ceil_mode

    def forward(self, a: Tensor) -> Tensor:
        sharp = self.sharpness
        if sharp is None:
            return F.max_pool2d(
                a, self.window, self.stride, self.padding, ceil_mode=bool(self.ceil)
            )
        down, across = self.padding
        bottom, right = down + self._short(a, 0), across + self._short(a, 1)
        if bottom or right:
            a = F.pad(a, (across, right, down, bottom), value=-1e3 * self.spread)
        windows = a.unfold(2, self.window[0], self.stride[0])
        windows = windows.unfold(3, self.window[1], self.stride[1])
        out: Tensor = torch.logsumexp(sharp * windows.flatten(4), 4) / sharp
        return out

    def _short(self, a: Tensor, axis: int) -> int:
        """Entries that the last window lacks along an axis, where sizes are rounded up."""
        stride, padding, size = self.stride[axis], self.padding[axis], a.shape[2 + axis]
        left = (size + 2 * padding - self.window[axis]) % stride
        if not self.ceil or left == 0:
            return 0
        starts_outside = size + 2 * padding - self.window[axis] - left + stride >= size + padding
        return 0 if starts_outside else stride - left


def swapped(model: nn.Module) -> nn.Module:
    """A copy of `model` whose activations and poolings with kinks are `Smooth` modules.

    Traces the model, so that functions called in a `forward` are found as well; a model that
    cannot be traced has its modules swapped.
    """
    clone = copy.deepcopy(model).eval()
    try:
        traced = fx.symbolic_trace(clone)
    except Exception:  # data-dependent control flow: any error a user's forward may raise
        return _modules_swapped(clone)
    if {k for k, _ in traced.named_parameters()} != {k for k, _ in clone.named_parameters()}:
        return _modules_swapped(clone)
    for number, node in enumerate(list(traced.graph.nodes)):
        smooth = _smooth_of(node, traced)
        if smooth is not None:
            name = f"smooth_{number}"
            traced.add_submodule(name, smooth)
            with traced.graph.inserting_before(node):
                call = traced.graph.call_module(name, (node.args[0],))
            node.replace_all_uses_with(call)
            traced.graph.erase_node(node)
    traced.graph.lint()
    traced.recompile()
    return traced


def kinked(network: nn.Module) -> bool:
    """Whether `network`, as given by `swapped`, has anything to smooth."""
    return any(isinstance(m, Smooth) for m in network.modules())


def measure(network: nn.Module, state: ModelState, data: DataSpec) -> None:
    """Set the spread of every `Smooth` module of `network`, in place.

    Raises:
        NotApplicable: the network has kinks that no module of it smooths, or is called with more
            than images.
    """
    if not takes_data_alone(state.model):
        raise NotApplicable("no smooth copy of the network: it is called with more than images")
    inputs = natural_like(data, _PUBLIC_IMAGES)
    reference = next(iter(state.params.values()))

    def watch(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        spread = float(arguments[0].detach().std())
        layer.spread = spread if spread > 0 else 1.0  # type: ignore[assignment]

    smooth = [m for m in network.modules() if isinstance(m, Smooth)]
    handles = [m.register_forward_pre_hook(watch) for m in smooth]
    try:
        _run(network, state, inputs.to(reference))
    finally:
        for handle in handles:
            handle.remove()
    with _Spy() as spy:
        _run(at_beta(network, 1.0), state, inputs.to(reference))
    if spy.found:
        raise NotApplicable(
            f"no smooth copy of the network: it calls {', '.join(sorted(spy.found))}"
        )


def at_beta(network: nn.Module, beta: float) -> nn.Module:
    """A copy of `network` smoothed at β."""
    clone = copy.deepcopy(network)
    for layer in clone.modules():
        if isinstance(layer, Smooth):
            layer.beta = beta
    return clone


def divide_outputs(network: nn.Module, by: float) -> None:
    """Divide what a traced network returns, in place; one that could not be traced stays."""
    if not isinstance(network, fx.GraphModule):
        return
    (end,) = (node for node in network.graph.nodes if node.op == "output")
    with network.graph.inserting_before(end):
        end.args = (network.graph.call_function(operator.truediv, (end.args[0], by)),)
    network.recompile()


def natural_like(data: DataSpec, count: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Random fields with the 1/f amplitude spectrum of photographs, (count, *shape), in the box.

    Channels share most of their variation, as colours do; contrast is a quarter of the box. Equal
    fields at every call, unless a generator is given.
    """
    channels, height, width = data.shape
    low, high = data.bounds
    stream = generator or torch.Generator().manual_seed(0)
    white = torch.randn(count, channels + 1, height, width, generator=stream, dtype=torch.float64)
    down = torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * height
    across = torch.fft.rfftfreq(width, dtype=torch.float64) * width
    frequency = (down**2 + across**2).sqrt().clamp(min=1.0)
    field = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    field = field[:, :1] + 0.3 * field[:, 1:]
    field = field / field.std((1, 2, 3), keepdim=True)
    images: Tensor = (low + (high - low) * (0.5 + 0.25 * field)).clamp(low, high)
    return images


class _Spy(TorchFunctionMode):
    """Notes the names of functions with kinks that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in KINKS:
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def _run(network: nn.Module, state: ModelState, inputs: Tensor) -> None:
    wanted = {k for k, _ in network.named_buffers()} | {k for k, _ in network.named_parameters()}
    numbers = {k: v for k, v in {**state.params, **state.buffers}.items() if k in wanted}
    with torch.no_grad():
        torch.func.functional_call(network, numbers, (inputs,))


def _smooth_module(layer: nn.Module | None) -> Smooth | None:
    """What replaces a module with kinks."""
    match layer:
        case nn.ReLU6():
            return SmoothReLU(cap=6.0)
        case nn.ReLU():
            return SmoothReLU()
        case nn.LeakyReLU():
            return SmoothReLU(slope=layer.negative_slope)
        case nn.MaxPool2d() if not layer.return_indices:
            return SmoothMaxPool(layer) if _pair(layer.dilation) == (1, 1) else None
    return None


def _smooth_of(node: fx.Node, traced: fx.GraphModule) -> Smooth | None:
    """What replaces one call of a traced network."""
    if node.op == "call_module":
        return _smooth_module(called_module(node, traced))
    if node.op not in ("call_function", "call_method") or not node.args:
        return None
    name = node.target if isinstance(node.target, str) else _name_of(node.target)
    rest: list[Any] = list(node.args[1:])
    options: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if name in ("relu", "relu_"):
        return SmoothReLU()
    if name == "relu6":
        return SmoothReLU(cap=6.0)
    if name in ("leaky_relu", "leaky_relu_"):
        return SmoothReLU(slope=float(options.get("negative_slope", (rest or [0.01])[0])))
    if name == "max_pool2d":
        return _smooth_module(nn.MaxPool2d(*rest, **options))
    return None


def _name_of(function: Any) -> str:
    if function is F.max_pool2d:
        return "max_pool2d"
    return str(getattr(function, "__name__", ""))


def _modules_swapped(clone: nn.Module) -> nn.Module:
    for name, layer in list(clone.named_modules()):
        smooth = _smooth_module(layer)
        if smooth is not None and name:
            clone.set_submodule(name, smooth)
    return clone


def called_module(node: fx.Node, traced: fx.GraphModule) -> nn.Module | None:
    """The module that a node calls; None if it calls none."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def keeps_values(node: fx.Node, traced: fx.GraphModule) -> bool:
    """Whether a call only reshapes: flatten, identity, dropout of a network in evaluation mode."""
    if node.op == "call_module":
        kept = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d)
        return isinstance(called_module(node, traced), kept)
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else _name_of(node.target)
    return name in ("flatten", "view", "reshape", "dropout")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
