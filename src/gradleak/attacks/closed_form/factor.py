"""Labels and head inputs of every example, from the softmax alone: any activation, any pooling.

The head's gradient ∂L/∂W = (1/b) Σ_i e_i h_iᵀ has rank b, so its b left singular vectors V span
the residuals: E = M V for an unknown b × b matrix M, and then H = b M⁻ᵀ (V ∂L/∂W). But residuals
and inputs belong to one network,

    E + Y = softmax(H Wᵀ + c),        mean of E = ∂L/∂c,

which are b (classes − 1) and more equations for the b² entries of M: few enough for Levenberg's
method to take milliseconds. Y are the labels, one-hot.

Exact for noise-free gradients of fewer examples than classes; rounding of the update is amplified
where two examples of one class have nearly equal predictions.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import softmax

Matrix = NDArray[np.float64]

_TRIES = 3
_SPREAD = 0.1
_EVALUATIONS = 300
_EXPLAINED = 1e-5
_RANK = 1e-10
_ROUNDING = 1e-4
_SINGULAR = 1e3
_PRECISE = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}


def factored(
    gradient: Matrix,
    bias_gradient: Matrix,
    weight: Matrix,
    bias: Matrix,
    candidates: Iterable[NDArray[np.int64]],
) -> tuple[Matrix, Matrix] | None:
    """Residuals (b, classes) and inputs (b, width) of a linear head; None if no try explains it.

    Args:
        gradient: (classes, width) mean gradient of the head's weight.
        bias_gradient: (classes,).
        weight: (classes, width) of the head.
        bias: (classes,).
        candidates: labels (b,) to try, likeliest first; all of one size.
    """
    source = np.random.default_rng(0)
    left, strengths, _ = np.linalg.svd(gradient, full_matrices=False)
    for labels in candidates:
        size = len(labels)
        if strengths[size - 1] <= _RANK * strengths[0] or (
            len(strengths) > size and strengths[size] > _ROUNDING * strengths[0]
        ):
            return None
        basis = left[:, :size].T
        projected = basis @ gradient
        wanted = np.eye(len(gradient))[labels]
        parts = (basis, projected @ weight.T, wanted, bias, bias_gradient)
        gaps, slopes = partial(_gaps, *parts), partial(_slopes, *parts)
        for _ in range(_TRIES):
            guess = softmax(bias + _SPREAD * source.standard_normal((size, len(bias))), axis=1)
            start = guess - wanted
            start += bias_gradient - start.mean(0)
            flat = (start @ basis.T).ravel()
            found = least_squares(
                gaps, flat, jac=slopes, method="lm", max_nfev=_EVALUATIONS, **_PRECISE
            )
            if np.linalg.norm(found.fun) > _EXPLAINED:
                continue
            mixing = found.x.reshape(size, size)
            residuals = mixing @ basis
            if (residuals.argmin(1) == labels).all():
                return residuals, size * np.linalg.inv(mixing).T @ projected
    return None


def _gaps(
    basis: Matrix, logits: Matrix, wanted: Matrix, bias: Matrix, mean: Matrix, flat: Matrix
) -> Matrix:
    """By how much residuals M V miss those of the inputs they imply, and their mean the bias's."""
    size = len(basis)
    mixing = flat.reshape(size, size)
    try:
        inverse = np.linalg.inv(mixing).T
    except np.linalg.LinAlgError:
        return np.full((size + 1) * len(bias), _SINGULAR)
    residuals = mixing @ basis
    own = residuals + wanted - softmax(size * inverse @ logits + bias, axis=1)
    return np.concatenate([own.ravel(), size * (residuals.mean(0) - mean)])


def _slopes(
    basis: Matrix, logits: Matrix, wanted: Matrix, bias: Matrix, mean: Matrix, flat: Matrix
) -> Matrix:
    """The Jacobian of `_gaps`: dM⁻ᵀ = −M⁻ᵀ dMᵀ M⁻ᵀ and d softmax = (diag p − p pᵀ) d logits."""
    size, classes = len(basis), len(bias)
    try:
        inverse = np.linalg.inv(flat.reshape(size, size)).T
    except np.linalg.LinAlgError:
        return np.zeros(((size + 1) * classes, size * size))
    implied = inverse @ logits
    shares = softmax(size * implied + bias, axis=1)
    centred = implied - (shares @ implied.T)[:, :, None]
    through = shares[:, None] * centred
    own = size * np.einsum("kj,kic->kcij", inverse, through)
    own[range(size), :, range(size)] += basis.T
    whole = np.broadcast_to(basis.T[:, None], (classes, size, size))
    return np.concatenate([own.reshape(-1, size * size), whole.reshape(classes, -1)])
