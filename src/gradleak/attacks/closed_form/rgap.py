"""R-GAP: one example, layer by layer, from linear equations (Zhu & Blaschko, ICLR 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, softplus, unfold
from torch.nn.grad import conv2d_input, conv2d_weight

from gradleak.attacks.closed_form.chain import Chain, Link, chain_of, unknowns
from gradleak.attacks.parts.client import plain_client
from gradleak.attacks.parts.needs import require
from gradleak.attacks.parts.smoothing import natural_like
from gradleak.mechanisms.client import own_buffers, template
from gradleak.types import About, Batch, DataSpec, Fact, ModelState, Observation, Reconstruction

_EXPLAINED = 1e-4
_REFINEMENTS = 30
_CONVERGED = 1e-15
_DEFICIENT = 1e-7
_SCAN = 4000
_OUTSIDE = 1e-3


def logistic(logits: Tensor, labels: Tensor) -> Tensor:
    """mean log(1 + exp(−y z)), y = ±1 for labels 1 and 0, of a network with one output."""
    signs = 2.0 * labels.to(logits) - 1
    total: Tensor = softplus(-signs * logits[:, 0]).mean()
    return total


@dataclass(frozen=True)
class RGap:
    """The input of every layer from what is above it, from the last to the first.

    For x, what enters a layer,

        A(x; W) + b = φ⁻¹(a)         weight equations: what is known above, through the activation
        d ⋆ x = ∂L/∂W                gradient equations: d = ∂L/∂z is known above as well

    which are linear in x. With d as (channels × positions) matrix U S Vᵀ the gradient equations
    become Vᵀ ⋆ x = S⁻¹ Uᵀ ∂L/∂W: fewer, and better conditioned.

    At the head ∂L/∂W = e hᵀ. With a bias e = ∂L/∂b. Without one h = λ ĥ, and λ is a root of
    e_y(λ ĥ) λ = (∂L/∂W ĥ)_y for the label y. For one output with logistic loss that is the paper's
    −μ/(1 + e^μ), which two μ share. Every root is tried. A network of LeakyReLU without biases is
    homogeneous: there each root gives a picture that explains the whole update, of another
    contrast; the claim is that of most contrast inside the data's bounds.

    Exact for one example, plain gradient, a chain of Linear and Conv2d with invertible activations
    and as many independent equations as unknowns in every layer (`recoverability`); otherwise
    `no_solution` and the layer that stops it. Noise grows from layer to layer.
    """

    about: ClassVar[About] = About(
        id="r-gap",
        title="Recursive closed form (R-GAP)",
        paper="Zhu, Blaschko, R-GAP: Recursive Gradient Attack on Privacy, ICLR 2021",
        link="https://openreview.net/forum?id=RSU17UoKfJF",
        modalities=frozenset({"image", "tabular"}),
        needs=frozenset({Fact.BATCH_SIZE}),
        likelihood="exact equations",
        prior="none",
        deviations=(
            "several outputs and softmax as well as the published single logistic output; biases",
            "roots by bisection between sign changes, where the published code descends by Adam",
            "normal equations with a Cholesky factor, refined on the equations themselves, in "
            "float64; the published code solves dense ones in single precision",
            "no equations for padding: padded entries are no unknowns",
            "roots that explain the update alike are told apart by the data's bounds; the paper "
            "compares residuals, which are equal for homogeneous networks",
        ),
    )

    def __call__(self, seen: Observation, *, generator: torch.Generator) -> Reconstruction:
        require(self.about, seen)
        size = seen.knowledge.batch_size or 1
        blank = torch.full((size, *seen.data.shape), sum(seen.data.bounds) / 2)
        nothing = Batch(blank, torch.zeros(size, dtype=torch.int64))

        def no_solution(why: str) -> Reconstruction:
            return Reconstruction(nothing, math.nan, "no_solution", message=why)

        client = plain_client(seen.mechanism)
        if size != 1:
            return no_solution(f"the recursion is exact for one example, the batch has {size}")
        if client is None or client.loss not in (cross_entropy, logistic):
            return no_solution("the update is not the plain gradient of a known loss")
        chain = chain_of(seen.state, seen.data)
        if isinstance(chain, str):
            return no_solution(chain)
        missing = [k.name for k in chain.links if f"{k.name}.weight" not in seen.update.values]
        if missing:
            return no_solution(f"the gradient of {missing[0]!r} did not leave the client")
        equations = _Equations(seen, logistic=client.loss is logistic)
        tried = [_descended(equations, chain, start) for start in equations.heads(chain.links[-1])]
        if not tried:
            return no_solution("the head's gradient is that of no single example")
        furthest = max(outcome.depth for outcome in tried)
        found = [outcome for outcome in tried if outcome.depth == furthest]
        if found[0].stopped:
            return no_solution(min(found, key=lambda outcome: outcome.gap).stopped)
        pictures = [(chain.undo(outcome.inputs), outcome) for outcome in found]
        x, best = max(pictures, key=lambda pair: _likely(pair[0], seen.data.bounds))
        claim = Batch(x.clamp(*seen.data.bounds)[None], torch.tensor([best.label]))
        rivals = len(found) - 1
        message = f"{rivals} more of other contrast explain the update as well" if rivals else ""
        return Reconstruction(claim, best.gap, "solved", message=message)

    def objective(self, seen: Observation) -> Callable[[Batch], float]:
        """A closed form minimises nothing: nan everywhere."""
        return lambda batch: math.nan


@dataclass(frozen=True)
class Start:
    """A candidate at the head: label, its input h (width,) and the error e (outputs,)."""

    label: int
    inputs: Tensor
    errors: Tensor


@dataclass(frozen=True)
class _Outcome:
    """How far a candidate came.

    Attributes:
        label: of the candidate.
        depth: layers that were solved, from the head down.
        inputs: what enters the last of them.
        gap: the largest share of a layer's equations not explained.
        stopped: why it came no further; empty at the first layer.
    """

    label: int
    depth: int
    inputs: Tensor
    gap: float
    stopped: str = ""


class _Equations:
    """Numbers of the network and the update in float64, layer by layer."""

    def __init__(self, seen: Observation, *, logistic: bool) -> None:
        self.params = {k: v.detach().double().cpu() for k, v in seen.state.params.items()}
        self.update = {k: v.detach().double().cpu() for k, v in seen.update.values.items()}
        self.logistic = logistic
        self.labels = seen.knowledge.labels
        self.precision = max(torch.finfo(v.dtype).eps for v in seen.update.values.values())

    def heads(self, head: Link) -> Iterator[Start]:
        """Every input, error and label of the head that explain its gradient."""
        weight, gradient = self.params[f"{head.name}.weight"], self.update[f"{head.name}.weight"]
        if gradient.ndim != 2 or not gradient.isfinite().all() or not gradient.any():
            return
        left, strengths, right = torch.linalg.svd(gradient, full_matrices=False)
        if len(strengths) > 1 and strengths[1] > _EXPLAINED * strengths[0]:
            return
        bias, bias_gradient = (of.get(f"{head.name}.bias") for of in (self.params, self.update))
        if bias_gradient is not None and bias_gradient.any():
            inputs = bias_gradient @ gradient / (bias_gradient @ bias_gradient)
            yield Start(self._label(bias_gradient), inputs, bias_gradient)
            return
        scaled, direction = left[:, 0] * strengths[0], right[0]
        logits = weight @ direction
        offset = torch.zeros_like(logits) if bias is None else bias
        for length, label in self._lengths(logits, offset, scaled):
            yield Start(label, length * direction, scaled / length)

    def _label(self, errors: Tensor) -> int:
        return int(errors[0] < 0) if self.logistic else int(errors.argmin())

    def _lengths(
        self, logits: Tensor, offset: Tensor, scaled: Tensor
    ) -> Iterator[tuple[float, int]]:
        """(λ, y) with e_y(λ) λ = (∂L/∂W ĥ)_y, of either sign, and errors negative at y."""
        choices = range(2) if self.logistic else range(len(logits))
        for label in choices:
            if self.labels is not None and label != int(self.labels[0]):
                continue
            row, sign = (0, 2 * label - 1) if self.logistic else (label, 1)

            def gaps(
                lengths: Tensor, label: int = label, row: int = row, sign: int = sign
            ) -> Tensor:
                z = lengths[:, None] * logits + offset
                if self.logistic:
                    errors = -sign * torch.sigmoid(-sign * z[:, 0])
                else:
                    others = torch.cat([z[:, :label], z[:, label + 1 :]], 1) - z[:, label, None]
                    errors = -torch.sigmoid(torch.logsumexp(others, 1))
                return errors * lengths - scaled[row]

            for length in _roots(gaps):
                errors = scaled / length
                if self._label(errors) == label and errors[row] * sign < 0:
                    yield length, label

    def solve(self, link: Link, z: Tensor, d: Tensor) -> tuple[Tensor, float] | str:
        """The layer's input (1, *shape) and the share of its equations not explained."""
        gradient, weight = self.update[f"{link.name}.weight"], self.params[f"{link.name}.weight"]
        bias = self.params.get(f"{link.name}.bias")
        if isinstance(link.layer, nn.Linear):
            if not d.any():
                return f"no gradient reaches {link.name!r}"
            found = (d @ gradient / (d @ d.T))[:1]
            gap = float((d.T @ found - gradient).norm() / gradient.norm())
            return found.view(1, *link.shape), gap
        wanted = z if bias is None else z - bias.view(1, -1, 1, 1)
        return _Convolution(link, weight, d, self.precision).inputs(wanted, gradient)


def _roots(gaps: Callable[[Tensor], Tensor]) -> Iterator[float]:
    """Zeros between neighbours of a logarithmic grid, of either sign, where `gaps` changes sign."""
    grid = torch.logspace(-6, 6, _SCAN, dtype=torch.float64)

    def gap(length: float) -> float:
        return float(gaps(torch.tensor([length], dtype=torch.float64))[0])

    for points in (grid, -grid):
        signs = gaps(points).sign()
        for place in torch.nonzero(signs[1:] * signs[:-1] < 0)[:, 0].tolist():
            low, high = float(points[place]), float(points[place + 1])
            yield float(brentq(gap, low, high, xtol=1e-300, rtol=1e-15))


def _descended(equations: _Equations, chain: Chain, start: Start) -> _Outcome:
    """From the head down to the first layer's input, or to the layer that stops it."""
    inputs, gap = start.inputs[None], 0.0
    head = chain.links[-1]
    below = start.errors[None] @ equations.params[f"{head.name}.weight"]
    for depth, link in enumerate(chain.links[-2::-1]):
        z, slope = inputs, torch.ones_like(inputs)
        if link.inverse is not None:
            z, slope = link.inverse(inputs)
        if not z.isfinite().all():
            why = f"no output of {link.name!r} is what its activation has to give"
            return _Outcome(start.label, depth, inputs, gap, why)
        shape = _outputs(link, inputs.numel())
        d = (below.reshape(inputs.shape) * slope).view(shape)
        found = equations.solve(link, z.view(shape), d)
        if isinstance(found, str):
            return _Outcome(start.label, depth, inputs, gap, found)
        inputs, left = found
        gap = max(gap, left)
        if not left <= _EXPLAINED:
            why = (
                f"the equations of {link.name!r} leave {left:.1%} unexplained: the update is no "
                "noise-free gradient of one example"
            )
            return _Outcome(start.label, depth, inputs, gap, why)
        below = _back(link, equations.params[f"{link.name}.weight"], d)
    return _Outcome(start.label, len(chain.links), inputs, gap)


def _likely(picture: Tensor, bounds: tuple[float, float]) -> tuple[bool, float]:
    """Whether a picture lies in the bounds, up to rounding, and its contrast."""
    outside = float((picture - picture.clamp(*bounds)).abs().max())
    return outside <= _OUTSIDE * (bounds[1] - bounds[0]), float(picture.std())


def _outputs(link: Link, numbers: int) -> tuple[int, ...]:
    if isinstance(link.layer, nn.Linear):
        return 1, numbers
    blank = torch.zeros((1, *link.shape), dtype=torch.float64)
    shape: tuple[int, ...] = tuple(
        conv2d(blank, torch.zeros_like(link.layer.weight).double(), None, *_geometry(link)).shape
    )
    return shape


def _back(link: Link, weight: Tensor, d: Tensor) -> Tensor:
    """∂L/∂x of the layer's input."""
    if isinstance(link.layer, nn.Linear):
        return d @ weight
    found: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
        (1, *link.shape), weight, d, *_geometry(link)
    )
    return found


def _geometry(link: Link) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    layer = link.layer
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer.padding, str)
    return layer.stride, layer.padding, layer.dilation, 1


class _Convolution:
    """Both sets of equations of one convolution, scaled to equal right-hand sides."""

    def __init__(self, link: Link, weight: Tensor, d: Tensor, precision: float) -> None:
        self.link, self.weight = link, weight
        matrix = d[0].flatten(1)
        left, strengths, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = strengths > 100 * precision * strengths[0]
        self.compressed = right[kept].view(1, -1, *d.shape[2:])
        self.to_compressed = (left[:, kept] / strengths[kept]).T
        self.ranks = int(kept.sum())

    def inputs(self, z: Tensor, gradient: Tensor) -> tuple[Tensor, float] | str:
        """(1, *shape) and the share not explained, by refined normal equations."""
        wanted_gradient = torch.tensordot(self.to_compressed, gradient, 1)
        if not z.any() or not wanted_gradient.any():
            return f"no gradient reaches {self.link.name!r}"
        self.first, self.second = float(1 / z.norm()), float(1 / wanted_gradient.norm())
        factor, info = torch.linalg.cholesky_ex(self.gram())
        if int(info):
            return f"{self.link.name!r} has fewer independent equations than unknowns"
        x = torch.zeros((1, *self.link.shape), dtype=torch.float64)
        for _ in range(_REFINEMENTS):
            left = (
                self.first * (z - self.outputs(x)),
                self.second * (wanted_gradient - self.gradients(x)),
            )
            step = torch.cholesky_solve(self.transposed(*left).reshape(-1, 1), factor).view_as(x)
            x = x + step
            if not step.norm() > _CONVERGED * x.norm():
                break
        gap = math.sqrt(sum(float((part**2).sum()) for part in left) / 2)
        return x, gap

    def outputs(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, None, *_geometry(self.link))

    def gradients(self, x: Tensor) -> Tensor:
        shape = (self.ranks, *self.weight.shape[1:])
        found: Tensor = conv2d_weight(  # type: ignore[no-untyped-call]
            x, shape, self.compressed, *_geometry(self.link)
        )
        return found

    def transposed(self, by_outputs: Tensor, by_gradients: Tensor) -> Tensor:
        """Aᵀ of both sets, with their scales."""
        shape = (len(by_outputs), *self.link.shape)
        first: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            shape, self.weight, by_outputs, *_geometry(self.link)
        )
        second: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            shape,
            by_gradients,
            self.compressed.expand(len(by_outputs), -1, -1, -1),
            *_geometry(self.link),
        )
        return self.first * first + self.second * second

    def gram(self) -> Tensor:
        """AᵀA (n, n). The gradient equations treat every channel alike: one block, repeated."""
        channels, height, width = self.link.shape
        n = unknowns(self.link)
        unit = torch.eye(n, dtype=torch.float64).view(n, *self.link.shape)
        total: Tensor = conv2d_input(  # type: ignore[no-untyped-call]
            unit.shape, self.weight, self.outputs(unit), *_geometry(self.link)
        )
        total = self.first**2 * total.view(n, n)
        pixels = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
        stride, padding, dilation, _ = _geometry(self.link)
        patches = unfold(pixels, self.weight.shape[2:], dilation, padding, stride)
        rows = torch.einsum("pkl,fl->pfk", patches, self.compressed[0].flatten(1)).flatten(1)
        block = self.second**2 * rows @ rows.T
        for channel in range(channels):
            part = slice(channel * height * width, (channel + 1) * height * width)
            total[part, part] += block
        return total


@dataclass(frozen=True)
class LayerRank:
    """Whether one layer's input follows from what is above it.

    Attributes:
        name: of the layer.
        unknowns: numbers that enter it.
        weight_equations: outputs of the layer.
        gradient_equations: independent ones, after compression.
        rank: independent equations of both kinds together, up to float64.
    """

    name: str
    unknowns: int
    weight_equations: int
    gradient_equations: int
    rank: int

    @property
    def recoverable(self) -> bool:
        return self.rank >= self.unknowns


def recoverability(state: ModelState, data: DataSpec) -> list[LayerRank] | str:
    """Rank analysis of every layer, before any update is seen; or why the network is no chain.

    Ranks are those at a random picture with the spectrum of photographs and label 0: equal for
    almost every picture.

    Source: Zhu & Blaschko, ICLR 2021, Section 4 (rank analysis).
    """
    chain = chain_of(state, data)
    if isinstance(chain, str):
        return chain
    if data.modality == "image":
        picture = natural_like(data, 1)
    else:
        stream = torch.Generator().manual_seed(0)
        low, high = data.bounds
        picture = low + (high - low) * torch.rand((1, *data.shape), generator=stream).double()
    entered, errors = _passed(state, chain, picture)
    params = {k: v.detach().double().cpu() for k, v in state.params.items()}
    found = []
    for link in chain.links:
        n, d = unknowns(link), errors[link.name]
        if isinstance(link.layer, nn.Linear):
            found.append(LayerRank(link.name, n, d.numel(), n if d.any() else 0, n * bool(d.any())))
            continue
        layer = _Convolution(link, params[f"{link.name}.weight"], d, torch.finfo(d.dtype).eps)
        x = entered[link.name]
        layer.first = float(1 / layer.outputs(x).norm())
        layer.second = float(1 / layer.gradients(x).norm())
        strengths = torch.linalg.eigvalsh(layer.gram()).clamp(min=0).sqrt()
        rank = int((strengths > _DEFICIENT * strengths[-1]).sum())
        equations = layer.ranks * layer.weight[0].numel()
        found.append(LayerRank(link.name, n, d.numel(), equations, rank))
    return found


def _passed(
    state: ModelState, chain: Chain, picture: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What enters every layer for one picture, and ∂L/∂z where it leaves, L = −log p_0."""
    model = template(state.model, "eval").to(torch.float64)
    params = {k: v.detach().double() for k, v in state.params.items()}
    buffers = own_buffers(model, state)
    fixed = {k: v.double() if v.is_floating_point() else v for k, v in buffers.items()}
    entered: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            entered[name], left[name] = given[0].detach(), out

        return hook

    handles = [model.get_submodule(k.name).register_forward_hook(note(k.name)) for k in chain.links]
    try:
        logits = torch.func.functional_call(model, (params, fixed), (picture.requires_grad_(),))
    finally:
        for handle in handles:
            handle.remove()
    label = torch.zeros(1, dtype=torch.int64)
    loss = logistic(logits, label) if logits.shape[1] == 1 else cross_entropy(logits, label)
    errors = torch.autograd.grad(loss, list(left.values()))
    return entered, dict(zip(left, errors, strict=True))
