"""Model inversion without a diffusion model: by pixels, or by the latents of a public generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak import priors
from gradleak.attacks.inversion.classifier import Classifier, top_k_margin
from gradleak.seeding import child, normal
from gradleak.types import DataSpec, ModelState


@dataclass(frozen=True, kw_only=True)
class PixelAscent:
    """Pixels that a class's logit rises with (Fredrikson, Jha & Ristenpart, CCS 2015), smoothed.

        −logit_y + mean of the k largest others + λ TV(x)

    Args:
        k: other classes in the margin.
        tv: λ, of the mean absolute difference of neighbours, for pixels from 0 to 1.
        steps: of Adam.
        rate: Adam's.
    """

    k: int = 3
    tv: float = 30.0
    steps: int = 200
    rate: float = 0.05

    def __call__(self, target: ModelState, data: DataSpec, *, images: int, seed: int) -> Tensor:
        """Images (classes, images, *shape)."""
        stream = child(torch.Generator().manual_seed(seed), "pixels")
        labels = torch.arange(data.classes).repeat_interleave(images)
        low, high = data.bounds
        x = low + (high - low) * torch.rand((len(labels), *data.shape), generator=stream)
        x.requires_grad_()
        adam = torch.optim.Adam([x], lr=self.rate * (high - low))
        classifier = Classifier(target)
        for _ in range(self.steps):
            with torch.enable_grad():
                down = (x[..., 1:, :] - x[..., :-1, :]).abs().flatten(1).mean(1)
                across = (x[..., 1:] - x[..., :-1]).abs().flatten(1).mean(1)
                margin = top_k_margin(classifier(x)[0], labels, self.k)
                loss = margin + self.tv / (high - low) * (down + across)
            (x.grad,) = torch.autograd.grad(loss.sum(), x)
            adam.step()
            with torch.no_grad():
                x.clamp_(low, high)
        return x.detach().reshape(data.classes, images, *data.shape)


@dataclass(frozen=True, kw_only=True)
class LatentSearch:
    """Latents of a generator of public pictures (after GMI, Zhang et al., CVPR 2020).

        −logit_y + mean of the k largest others + λ ‖z‖² / latent

    The generator stands for GMI's prior; its critic's loss is not among the terms.

    Args:
        k: other classes in the margin.
        nearness: λ.
        steps: of Adam.
        rate: Adam's.
    """

    k: int = 3
    nearness: float = 1.0
    steps: int = 100
    rate: float = 0.05

    def __call__(
        self, target: ModelState, generator: priors.Generator, *, images: int, seed: int
    ) -> Tensor:
        """Images (classes, images, *shape)."""
        data = generator.data
        stream = child(torch.Generator().manual_seed(seed), "latents")
        labels = torch.arange(data.classes).repeat_interleave(images)
        shape = (len(labels), generator.latent)
        z = normal(shape, generator=stream, dtype=torch.float32).requires_grad_()
        adam = torch.optim.Adam([z], lr=self.rate)
        classifier = Classifier(target)
        for _ in range(self.steps):
            with torch.enable_grad():
                logits, _ = classifier(generator.images(z))
                near = z.square().mean(1)
                loss = top_k_margin(logits, labels, self.k) + self.nearness * near
            (z.grad,) = torch.autograd.grad(loss.sum(), z)
            adam.step()
        with torch.no_grad():
            return generator.images(z).reshape(data.classes, images, *data.shape)
