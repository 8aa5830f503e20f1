"""A trained classifier as whoever holds its weights can use it, and what inversion asks of it."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from gradleak.errors import InvalidInput, NotApplicable
from gradleak.types import ModelState

_AT_ONCE = 500


class Classifier:
    """images (n, *shape) in the data's bounds → logits (n, classes), features (n, d).

    Features are what the network's last linear layer reads. Differentiable in the images.

    Raises:
        NotApplicable: the network has no linear layer.
    """

    def __init__(self, state: ModelState) -> None:
        self._network = copy.deepcopy(state.model).eval().requires_grad_(requires_grad=False)
        self._numbers = {**state.params, **state.buffers}
        heads = [m for m in self._network.modules() if isinstance(m, nn.Linear)]
        if not heads:
            raise NotApplicable("the classifier has no linear layer: no features to read")
        self._head = heads[-1]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        read: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            logits = functional_call(self._network, self._numbers, (images,))
        finally:
            hook.remove()
        return logits, read[-1].flatten(1)

    def told(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The same without gradients, in pieces, for many images."""
        with torch.no_grad():
            pieces = [self(piece) for piece in torch.split(images, _AT_ONCE)]
        return torch.cat([logits for logits, _ in pieces]), torch.cat([f for _, f in pieces])


def most_confident(logits: Tensor, count: int) -> Tensor:
    """Indices (classes, count) of the images that each class is most probable for.

    Images may serve several classes.

    Args:
        logits: (n, classes) of public images.
        count: images per class, at most n.
    """
    if not 1 <= count <= len(logits):
        raise InvalidInput(
            f"{count} pseudo-labelled images a class: expected 1 to {len(logits)}, the public ones"
        )
    return logits.log_softmax(1).T.topk(count, dim=1).indices


def top_k_margin(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """−logit_y + mean of the k largest other logits: (n,); k = 0 leaves −logit_y.

    Args:
        logits: (n, classes).
        labels: (n,).
        k: others; as many as there are where there are fewer.
    """
    own = logits.gather(1, labels[:, None])
    if k == 0:
        return -own[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(k, logits.shape[1] - 1), 1).values.mean(1) - own[:, 0]


def augmented(
    images: Tensor,
    *,
    generator: torch.Generator,
    shift: float,
    degrees: float,
    scale: float,
    jitter: float,
    blur: float,
) -> Tensor:
    """Images (n, c, h, w) in [−1, 1], moved, turned, scaled, brightened and blurred at random.

    Args:
        images: differentiable in them.
        generator: of the draws, one each per image.
        shift: largest, in pixels.
        degrees: largest turn.
        scale: largest enlargement, as a share.
        jitter: largest change of brightness and of contrast, as shares.
        blur: standard deviation of a Gaussian in pixels; 0 leaves images sharp.
    """
    count, channels, height, width = images.shape

    def drawn(size: float) -> Tensor:
        return ((2 * torch.rand(count, generator=generator) - 1) * size).to(images)

    turn, larger = drawn(math.radians(degrees)), 1 + drawn(scale)
    across, down = drawn(2 * shift / width), drawn(2 * shift / height)
    cosine, sine = turn.cos() / larger, turn.sin() / larger
    rows = torch.stack(
        [torch.stack([cosine, -sine, across], 1), torch.stack([sine, cosine, down], 1)], 1
    )
    places = F.affine_grid(rows, [count, channels, height, width], align_corners=False)
    moved = F.grid_sample(images, places, padding_mode="border", align_corners=False)
    light, contrast = drawn(jitter)[:, None, None, None], 1 + drawn(jitter)[:, None, None, None]
    middle = moved.mean((1, 2, 3), keepdim=True)
    found = (moved - middle) * contrast + middle + light
    return _blurred(found, blur) if blur else found


def _blurred(images: Tensor, deviation: float) -> Tensor:
    reach = math.ceil(2 * deviation)
    places = torch.arange(-reach, reach + 1).to(images)
    weights = torch.exp(-((places / deviation) ** 2) / 2)
    weights = (weights / weights.sum()).repeat(images.shape[1], 1)
    padded = F.pad(images, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, weights[:, None, None], groups=images.shape[1])
    return F.conv2d(across, weights[:, None, :, None], groups=images.shape[1])
