"""R-GAP: one example, layer by layer, from linear equations (Zhu & Blaschko, ICLR 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from gradleak.attacks.closed_form.chain import Chain, Link, chain_of
from gradleak.attacks.closed_form.explained import no_solution
from gradleak.attacks.closed_form.layer_equations import Convolution, back, output_shape
from gradleak.attacks.parts.client import plain_client
from gradleak.attacks.parts.needs import require
from gradleak.types import About, Batch, Fact, Observation, Reconstruction

_EXPLAINED = 1e-4
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
        classifiers=True,
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
        refuse = partial(no_solution, seen)
        client = plain_client(seen.mechanism)
        if size != 1:
            return refuse(f"the recursion is exact for one example, the batch has {size}")
        if client is None or client.loss not in (cross_entropy, logistic):
            return refuse("the update is not the plain gradient of a known loss")
        chain = chain_of(seen.state, seen.data)
        if isinstance(chain, str):
            return refuse(chain)
        missing = [k.name for k in chain.links if f"{k.name}.weight" not in seen.update.values]
        if missing:
            return refuse(f"the gradient of {missing[0]!r} did not leave the client")
        equations = _Equations(seen, logistic=client.loss is logistic)
        tried = [_descended(equations, chain, start) for start in equations.heads(chain.links[-1])]
        if not tried:
            return refuse("the head's gradient is that of no single example")
        furthest = max(outcome.depth for outcome in tried)
        found = [outcome for outcome in tried if outcome.depth == furthest]
        if found[0].stopped:
            return refuse(min(found, key=lambda outcome: outcome.gap).stopped)
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
        return Convolution(link, weight, d, self.precision).inputs(wanted, gradient)


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
        shape = output_shape(link, inputs.numel())
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
        below = back(link, equations.params[f"{link.name}.weight"], d)
    return _Outcome(start.label, len(chain.links), inputs, gap)


def _likely(picture: Tensor, bounds: tuple[float, float]) -> tuple[bool, float]:
    """Whether a picture lies in the bounds, up to rounding, and its contrast."""
    outside = float((picture - picture.clamp(*bounds)).abs().max())
    return outside <= _OUTSIDE * (bounds[1] - bounds[0]), float(picture.std())
