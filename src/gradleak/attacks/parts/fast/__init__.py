"""The exact fast inner step: value and gradient of the fit, for many trials at once.

    g_t = ∇_θ ℓ(f_θ(x_t), y_t),   D(g_t, G_t) and its gradient in x_t (and in soft y_t)

All trials run as one batch through the shared weights. Automatic differentiation covers the data
path only; each layer with parameters contributes ⟨g_t, G_t⟩, ‖g_t‖² and two cotangents by a closed
form, so that weight gradients per trial are rarely formed and never differentiated.
"""

from gradleak.attacks.parts.fast.fit import FastFit

__all__ = ["FastFit"]
