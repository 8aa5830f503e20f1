"""CVB: a convolutional variational bottleneck early in the network (Scheliga et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from gradleak.defenses.precode import DrawnLatent, VariationalBottleneck
from gradleak.defenses.sheet import Sheet
from gradleak.denoising import denoises
from gradleak.errors import InvalidInput
from gradleak.types import Mechanism, Update


def cvb(
    model: nn.Module, shape: tuple[int, ...], *, share: float = 0.5, weight: float = 1e-3
) -> nn.Module:
    """Put a convolutional bottleneck behind the first convolution of `model`, in place.

    Encoder and decoder are 3×3 convolutions, ε has a value per latent channel and pixel. Sizes and
    weight are ours.

    Args:
        model: the network.
        shape: of one input, which decides the number of pixels.
        share: latent channels as a share of the convolution's.
        weight: of the divergence in bits, averaged over pixels.

    Raises:
        InvalidInput: there is no convolution with a name.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n]
    if not found:
        raise InvalidInput("cvb: expected a network with a convolution")
    name, first = found[0]
    seen: list[torch.Size] = []
    handle = first.register_forward_hook(lambda _m, _given, made: seen.append(made.shape))
    training = model.training
    with torch.no_grad():
        blank = next(model.parameters()).new_zeros((1, *shape))
        given = (blank, torch.zeros(1, dtype=torch.int64)) if denoises(model) else (blank,)
        model.eval()(*given)
    model.train(training)
    handle.remove()
    _, width, *sides = seen[0]
    latent = max(1, round(share * width))
    bottleneck = VariationalBottleneck(
        nn.Conv2d(width, 2 * latent, 3, padding=1),
        nn.Conv2d(latent, width, 3, padding=1),
        latent=(latent, *sides),
        weight=weight / (sides[0] * sides[1]),
    )
    model.set_submodule(name, nn.Sequential(first, bottleneck))
    return model


@dataclass(frozen=True)
class ConvolutionalBottleneck:
    """u = ∇_θ (1/b) Σ_i [ℓ(f_θ(x_i, ε_i), y_i) + w · KL(N(μ_i, σ_i²) ‖ N(0, 1))], ε ~ N(0, 1).

    As `precode`, with the bottleneck behind the first convolution (`cvb(model, shape)`, `--model
    lenet+cvb`), so that nearly every layer's gradient is random. An attack that knows it adds the
    divergence and holds ε at zero; `latent-inversion` varies ε with the image.

    Source: Scheliga, Mäder & Seeland, "Privacy Preserving Federated Learning with Convolutional
    Variational Bottlenecks", 2023.
    """

    id: ClassVar[str] = "cvb"
    title: ClassVar[str] = "Convolutional variational bottleneck"
    sheet: ClassVar[Sheet] = Sheet(
        paper="Scheliga, Mäder & Seeland, Privacy Preserving Federated Learning with Convolutional "
        "Variational Bottlenecks, 2023",
        link="https://arxiv.org/abs/2309.04515",
        promises="latent noise early in the network, so that no layer worth matching is without it",
        broken_by="searching for the noise together with the image (`latent-inversion`)",
        cost="two small convolutions; their noise and divergence slow training",
    )

    def __call__(self, mechanism: Mechanism) -> Mechanism:
        return DrawnLatent(mechanism, self)

    def doubt(self, before: Update, after: Update) -> tuple[str, float] | None:
        """One update cannot contradict a claim about noise inside the network."""
        return None
