"""What an update can say about the inputs at most, whatever the attack: Fisher information.

For f: inputs (b, *shape) -> mean update (p,), with Jacobian J (p × d, d entries of all inputs) and
independent noise of location information i_j (per squared unit) on coordinate j of the update,

    F(x) = Jᵀ diag(i) J

is the Fisher information of the update about x. Only `van_trees_floor` bounds every attack; the
others bound unbiased estimates or rank targets, and say so. All of it is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.metrics.statistics import mean_at_most
from gradleak.types import Batch, Mechanism, ModelState

UpdateMap = Callable[[Tensor], Tensor]
"""Inputs (b, *shape) in float64 -> flat mean update (p,), differentiable."""

Draw = TypeVar("Draw")
_Product = Callable[[Tensor], Tensor]
_DENSE = 64
"""Up to so many entries the Gram matrix itself is cheaper than Lanczos."""


@dataclass(frozen=True, slots=True)
class Floor:
    """A floor under the mean squared error per entry, averaged over targets and noise.

    Attributes:
        proved: lower confidence limit of the floor; 0 where the draws do not support one.
        estimate: the floor with the average over draws put in; biased upwards, so no bound.
        confidence: of `proved`, one-sided.
        n: draws.
    """

    proved: float
    estimate: float
    confidence: float
    n: int


def update_map(mechanism: Mechanism, state: ModelState, labels: Tensor) -> UpdateMap:
    """Inputs -> mean update as one vector, parameters in the order of `state.params`.

    Args:
        mechanism: its `mean` is taken; noise on top enters as information per coordinate.
        state: broadcast state; used in float64.
        labels: (b,) int64, or (b, classes).
    """
    state = state.to(torch.float64)
    labels = labels.double() if labels.is_floating_point() else labels

    def f(inputs: Tensor) -> Tensor:
        values = mechanism.mean(state, Batch(inputs, labels)).values
        return torch.cat([values[name].flatten() for name in state.params])

    return f


def gaussian_information(std: float) -> float:
    """Location information of Gaussian noise, 1 / std², per squared unit of the update."""
    return 1 / _positive(std=std) ** 2


def laplace_information(std: float) -> float:
    """Location information of Laplace noise of scale b = std/√2, 1 / b² = 2 / std²."""
    return 2 / _positive(std=std) ** 2


def jacobian(f: UpdateMap, inputs: Tensor, *, chunk: int = 64) -> Tensor:
    """J = ∂f/∂x, `chunk` columns at a time.

    Returns:
        (p, d) in float64: 8 p d bytes. `information_matrix` never holds it.
    """
    push, _, _ = _products(f, inputs)
    return torch.cat([push(e) for e in _unit_vectors(inputs, chunk)]).T


def information_matrix(
    f: UpdateMap, inputs: Tensor, *, per_coordinate: float | Tensor = 1.0, chunk: int = 64
) -> Tensor:
    """F = Jᵀ diag(i) J, `chunk` columns at a time without storing J.

    Args:
        f: mean update.
        inputs: (b, *shape), where to differentiate.
        per_coordinate: i, one number or (p,); 1 gives the Gram matrix JᵀJ.
        chunk: columns computed together; memory is that of so many updates.

    Returns:
        (d, d), symmetric, in float64.
    """
    push, pull, _ = _products(f, inputs)
    matrix = torch.cat([pull(per_coordinate * push(e)) for e in _unit_vectors(inputs, chunk)])
    return (matrix + matrix.T) / 2


def van_trees_floor(
    information: Callable[[Draw], Tensor],
    draws: Sequence[Draw],
    *,
    precision: Tensor,
    confidence: float = 0.95,
) -> Floor:
    """Bayesian Cramér–Rao floor: E‖x̂ − x‖² / d ≥ tr (E F(x) + P)⁻¹ / d for every estimator x̂.

    Biased or prior-using, x̂ is any function of the update. The average over x is taken inside the
    inverse: the average of `posterior_trace` is larger (Jensen) and can exceed the smallest error.
    So is the inverse of a sample's average. As tr (M + P)⁻¹ is convex in M, its tangent at the
    average M₀ of the first half of the draws lies below it everywhere, and is linear in E F:

        floor ≥ tr S / d + tr(S M₀ S) / d − E tr(S F S) / d,   S = (M₀ + P)⁻¹,

    whose last term the second half bounds from above (`mean_at_most`), or cannot.

    Holds for f locally Lipschitz (tanh or softplus networks; not ReLU, max-pooling or top-k, whose
    updates jump), targets drawn from the prior, and noise independent between coordinates.
    Examples are compared in order: matching the claims of a batch to its truths afterwards can go
    below. It says nothing about one single target.

    Args:
        information: draw -> F(x), (d, d).
        draws: independent draws from the prior (of inputs, or of anything `information` takes), in
            random order; at least 4, and 40 for the stated confidence. A share q of the prior that
            holds most of E F and that n draws all miss, as they do with probability (1 − q)ⁿ, is
            beyond any number of them.
        precision: P, (d, d), the information of the prior; Σ⁻¹ for N(μ, Σ).
        confidence: of the floor, one-sided.

    Source: Van Trees 1968, section 2.4.3; Gill and Levit 1995.
    """
    n, d = len(draws), len(precision)
    if n < 4:
        raise InvalidInput(f"{n} draws from the prior: expected at least 4")
    if not 0.5 <= confidence < 1:
        raise InvalidInput(f"confidence={confidence}: expected 0.5 <= confidence < 1")
    half = n // 2
    total = torch.zeros_like(precision, dtype=torch.float64)
    for x in draws[:half]:
        total += _like(precision, information(x))
    pilot = total / half
    inverse = _inverse(pilot + precision)
    squared = inverse @ inverse
    slopes = []
    for x in draws[half:]:
        matrix = _like(precision, information(x))
        total += matrix
        slopes.append(float((squared * matrix).sum()) / d)
    slope = mean_at_most(slopes, confidence=confidence)
    tangent = float(inverse.trace() + (squared * pilot).sum()) / d - slope
    return Floor(max(0.0, tangent), posterior_trace(total / n, precision), confidence, n)


def posterior_trace(information: Tensor, precision: Tensor) -> float:
    """tr (F + P)⁻¹ / d: expected error per entry if the posterior were Gaussian at this target.

    A score that ranks targets before any attack has run, and no bound.

    Args:
        information: F at the target, (d, d).
        precision: P of the prior, (d, d).
    """
    total = _like(precision, information) + precision
    return float(_inverse(total).trace()) / len(precision)


def dfil(information: Tensor) -> float:
    """Diagonal Fisher information leakage, η² = tr F / d.

    1 / η² is a floor under the squared error per entry of *unbiased* estimates of this target. An
    attack that uses a prior is biased and goes below it.

    Source: Guo, Karrer, Chaudhuri and van der Maaten 2022, "Bounding training data reconstruction
    in private (deep) learning".
    """
    return float(information.trace()) / len(information)


def dfil_probed(
    f: UpdateMap,
    inputs: Tensor,
    *,
    generator: torch.Generator,
    per_coordinate: float | Tensor = 1.0,
    probes: int = 50,
) -> tuple[float, float]:
    """`dfil` from random signs: η² = E ‖Jᵀ (√i ∘ s)‖² / d, one vector product per probe.

    Returns:
        Mean over the probes, and its standard error.

    Source: Hutchinson 1990.
    """
    if probes < 2:
        raise InvalidInput(f"probes={probes}: expected at least 2")
    _, pull, p = _products(f, inputs)
    root = torch.as_tensor(per_coordinate, dtype=torch.float64, device=inputs.device).sqrt()
    values = []
    for _ in range(probes):
        signs = torch.randint(2, (p,), generator=generator).to(inputs.device, torch.float64)
        values.append(pull(root * (2 * signs - 1)[None]).square().mean())
    each = torch.stack(values)
    return float(each.mean()), float(each.std()) / probes**0.5


def influence(f: UpdateMap, inputs: Tensor, perturbation: Tensor, *, damping: float) -> float:
    """Inversion influence ‖(JᵀJ + λI)⁻¹ Jᵀδ‖: how far a known δ on the update moves the claim.

    First order in δ, for an attack by gradient matching that starts near the truth: a score. As δ
    is what the protection really added, it covers noise, pruning and clipping alike.

    Args:
        f: mean update.
        inputs: (b, *shape), the truth.
        perturbation: δ, (p,), update sent − update without protection.
        damping: λ > 0.

    Source: Zhang et al. 2023, "Understanding deep gradient leakage via inversion influence
    functions".
    """
    gram = information_matrix(f, inputs)
    gram.diagonal().add_(_positive(damping=damping))
    pulled = _pulled(f, inputs, perturbation)
    return float(torch.cholesky_solve(pulled[:, None], _cholesky(gram)).norm())


def influence_bound(
    f: UpdateMap,
    inputs: Tensor,
    perturbation: Tensor,
    *,
    damping: float,
    generator: torch.Generator,
) -> float:
    """Lower bound of `influence`, ‖Jᵀδ‖ / (λ_max(JᵀJ) + λ): two products per Lanczos step."""
    push, pull, _ = _products(f, inputs)
    d = inputs.numel()

    def gram_times(v: NDArray[np.float64]) -> NDArray[np.float64]:
        product = pull(push(torch.from_numpy(v.reshape(1, d)).to(inputs.device)))
        return product[0].cpu().numpy()

    if d <= _DENSE:
        largest = float(torch.linalg.eigvalsh(information_matrix(f, inputs))[-1])
    else:
        start = torch.randn(d, generator=generator, dtype=torch.float64).numpy()
        operator = LinearOperator((d, d), matvec=gram_times, dtype=np.float64)
        # Lanczos approaches from below: the margin, far above its tolerance, keeps the bound.
        found = eigsh(operator, k=1, v0=start, tol=1e-9, return_eigenvectors=False)
        largest = (1 + 1e-6) * float(found[0])
    pulled = _pulled(f, inputs, perturbation)
    return float(pulled.norm()) / (largest + _positive(damping=damping))


def recoverable_dimensions(
    f: UpdateMap, inputs: Tensor, *, noise_std: float | Tensor = 0.0, tolerance: float = 1e-6
) -> int:
    """Rank of J over the coordinates released without noise: directions fixed exactly, locally.

    Counts singular values above `tolerance` times the largest. The default is about the rounding
    of a float32 update: smaller ones exist and cannot be read. Under noise everywhere, however
    little, the count is 0 and `posterior_trace` says how much that is worth.

    Args:
        f: mean update.
        inputs: (b, *shape).
        noise_std: standard deviation of the noise, one number or (p,).
        tolerance: relative to the largest singular value; at least √(d · 2.2e-16), what float64
            resolves in JᵀJ.

    Returns:
        Between 0 and d; d means that the inputs are locally determined.
    """
    d = inputs.numel()
    least = (d * torch.finfo(torch.float64).eps) ** 0.5
    if not least <= tolerance < 1:
        raise InvalidInput(f"tolerance={tolerance}: expected {least:.1e} <= tolerance < 1")
    exact = (torch.as_tensor(noise_std, device=inputs.device) == 0).double()
    values = torch.linalg.eigvalsh(information_matrix(f, inputs, per_coordinate=exact))
    return int((values > tolerance**2 * values[-1].clamp(min=0)).sum())


def _products(f: UpdateMap, inputs: Tensor) -> tuple[_Product, _Product, int]:
    """Rows v (n, d) -> J v, rows w (n, p) -> Jᵀ w, and p. Reverse mode only, which every layer
    supports: J v is the derivative of the linear map w -> Jᵀ w."""
    x = inputs.detach().double().requires_grad_()
    update = f(x)
    if update.ndim != 1:
        raise InvalidInput(f"update of shape {tuple(update.shape)}: expected one vector, (p,)")
    w = torch.zeros_like(update, requires_grad=True)
    (back,) = torch.autograd.grad(update, x, w, create_graph=True)

    def rows_of(y: Tensor, z: Tensor, cotangents: Tensor) -> Tensor:
        shaped = cotangents.reshape(-1, *y.shape)
        (rows,) = torch.autograd.grad(y, z, shaped, retain_graph=True, is_grads_batched=True)
        return rows.flatten(1)

    return partial(rows_of, back, w), partial(rows_of, update, x), len(update)


def _pulled(f: UpdateMap, inputs: Tensor, perturbation: Tensor) -> Tensor:
    _, pull, p = _products(f, inputs)
    if perturbation.shape != (p,):
        raise InvalidInput(f"perturbation {tuple(perturbation.shape)}: expected ({p},)")
    return pull(perturbation.double()[None])[0]


def _unit_vectors(inputs: Tensor, chunk: int) -> Iterator[Tensor]:
    """The rows of the d × d identity, at most `chunk` at a time."""
    d = inputs.numel()
    for start in range(0, d, chunk):
        rows = torch.arange(start, min(start + chunk, d), device=inputs.device)
        yield torch.nn.functional.one_hot(rows, d).double()


def _like(precision: Tensor, matrix: Tensor) -> Tensor:
    if matrix.shape != precision.shape or precision.ndim != 2:
        raise InvalidInput(
            f"information {tuple(matrix.shape)} and precision {tuple(precision.shape)}: "
            "expected (d, d) both"
        )
    return matrix


def _cholesky(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix.double())
    if int(failed):
        raise InvalidInput("information + precision is singular: expected a proper prior")
    return factor  # type: ignore[no-any-return]


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(_cholesky(matrix))


def _positive(**values: float) -> float:
    ((name, value),) = values.items()
    if not 0 < value < float("inf"):
        raise InvalidInput(f"{name}={value}: expected a positive number")
    return value
