"""How drawn images compare with real ones: a Fréchet distance between features of both.

The features are those of a small classifier trained here, on examples that are in neither cloud.
They are no Inception's: such distances compare with one another, and with no published FID.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.data import Dataset
from gradleak.denoising import Schedule, ddim
from gradleak.denoising.sampling import Denoise
from gradleak.errors import InvalidInput
from gradleak.metrics.frechet import frechet_distance
from gradleak.models import accuracy, train
from gradleak.models.seeding import seeded
from gradleak.run.jobs import derive
from gradleak.seeding import child, normal
from gradleak.types import DataSpec

FEATURES = 16
_STEPS, _DRAWING = 300, 50
_MOST_TRAINED, _MOST_REAL = 10_000, 2_000


@dataclass(frozen=True)
class SampleQuality:
    """A distance, and what it takes to read it.

    Attributes:
        frechet: between features of samples and of real images; smaller is better.
        floor: between real images, as many as there are samples, and the same real images.
        samples: images drawn.
        real: images they are compared with.
        extractor: whose features these are.
        extractor_accuracy: of its classes, on the real images.
    """

    frechet: float
    floor: float
    samples: int
    real: int
    extractor: str
    extractor_accuracy: float


def sample_quality(
    drawn: Tensor, dataset: Dataset, indices: Tensor, *, seed: int, half: Tensor | None = None
) -> SampleQuality:
    """Compare drawn images (n, *shape), in the data's bounds, with real ones.

    Args:
        drawn: finite or not; what is not counts as zero.
        dataset: real images.
        indices: of those to use: half of them train the extractor, the others are compared with.
        seed: of the extractor.
        half: compare with these instead, and train the extractor on all of `indices`.

    Raises:
        InvalidInput: too few real images.
    """
    if half is None:
        middle = len(indices) // 2
        indices, half = indices[:middle], indices[middle:]
    count, extractor = len(drawn), f"convnet-{FEATURES}"
    taught, rest = indices[:_MOST_TRAINED], half
    real, others = rest[count : count + _MOST_REAL], rest[:count]
    if len(real) < FEATURES or len(others) < count or count < 2:
        raise InvalidInput(
            f"{count} samples beside {len(rest)} real images: expected 2 samples or more, and "
            f"{FEATURES} real images more than samples"
        )
    state = train(
        _network(dataset.spec, seed=derive(seed, "extractor")),
        dataset,
        taught,
        steps=_STEPS,
        seed=derive(seed, "extractor"),
    )
    network = _network(dataset.spec, seed=0)
    network.load_state_dict({**state.params, **state.buffers})
    raw = _features(network.eval())
    found = raw(dataset.batch(real).inputs)
    spread = found.std(0).clamp(min=1e-6)

    def features(images: Tensor) -> Tensor:
        return raw(images) / spread

    known = found / spread
    low, high = dataset.spec.bounds
    clean = drawn.nan_to_num(low, high, low).clamp(low, high)
    return SampleQuality(
        frechet=frechet_distance(features(clean), known),
        floor=frechet_distance(features(dataset.batch(others).inputs), known),
        samples=count,
        real=len(real),
        extractor=(
            f"{extractor}: {FEATURES} units before the head of two convolutions, {_STEPS} steps of "
            f"Adam on {len(taught)} other images, seed {seed}; scaled to unit variance"
        ),
        extractor_accuracy=accuracy(state, dataset, real),
    )


def drawn_images(
    schedule: Schedule,
    denoise: Denoise,
    spec: DataSpec,
    *,
    count: int,
    generator: torch.Generator,
    steps: int = _DRAWING,
) -> Tensor:
    """Images (count, *spec.shape) that a denoiser draws, in the data's bounds."""
    latents = normal(
        (count, *spec.shape), generator=child(generator, "latents"), dtype=torch.float32
    )
    noise, steps = child(generator, "steps"), min(steps, schedule.timesteps)
    with torch.no_grad():
        parts = [
            ddim(schedule, denoise, part, steps=steps, eta=1.0, generator=noise)
            for part in torch.split(latents, 64)
        ]
    low, high = spec.bounds
    return low + (torch.cat(parts) + 1) * ((high - low) / 2)


def _features(network: nn.Module) -> Callable[[Tensor], Tensor]:
    assert isinstance(network, nn.Sequential)
    body = network[:-1]

    def found(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([body(part.float()) for part in torch.split(images, 250)])

    return found


def _network(spec: DataSpec, *, seed: int) -> nn.Module:
    with seeded(seed):
        return nn.Sequential(
            nn.Conv2d(spec.shape[0], 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, FEATURES),
            nn.SiLU(),
            nn.Linear(FEATURES, spec.classes),
        )
