"""A dataset in memory, and its seeded division into clients' and public examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.types import Batch, DataSpec

MOST_CLASSES = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Labelled images held in memory.

    Attributes:
        name: what the user asked for.
        images: (N, C, H, W), uint8 in 0..255 or float32 in [0, 1].
        labels: (N,) int64.
        spec: form of one example.
        licence: short statement of the terms of use.
        fingerprint: the first 16 hexadecimal digits of SHA-256 over shape, images and labels.
    """

    name: str
    images: Tensor
    labels: Tensor
    spec: DataSpec
    licence: str
    fingerprint: str

    @classmethod
    def of(
        cls,
        name: str,
        images: Tensor,
        labels: Tensor,
        *,
        licence: str = "unstated",
        classes: int | None = None,
        class_names: Sequence[str] = (),
    ) -> Dataset:
        """Check images and labels and derive the spec and the fingerprint.

        Args:
            name: shown in reports.
            images: (N, C, H, W), uint8 in 0..255 or floating point in [0, 1].
            labels: (N,) whole numbers from 0.
            licence: short statement of the terms of use.
            classes: number of classes; by default one more than the largest label. A single class
                becomes two, because a classifier with one class has no gradient to leak.
            class_names: names in label order, or empty.

        Raises:
            InvalidInput: nothing in it, wrong shapes, or values out of range.
        """
        if images.ndim != 4 or 0 in images.shape:
            raise InvalidInput(
                f"data {name!r}: images {tuple(images.shape)}, expected (N, channels, height, "
                "width) with at least one image"
            )
        if images.dtype != torch.uint8:
            images = images.to(torch.float32)
            low, high = float(images.min()), float(images.max())
            if not (low >= 0 and high <= 1):
                raise InvalidInput(
                    f"data {name!r}: image values from {low:g} to {high:g}, expected 0..255 as "
                    "uint8 or 0..1 as floating point"
                )
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise InvalidInput(
                f"data {name!r}: labels {tuple(labels.shape)} of {labels.dtype}, expected "
                f"({len(images)},) whole numbers"
            )
        labels = labels.to(torch.int64)
        top = int(labels.max())
        classes = classes or len(class_names) or top + 1
        if int(labels.min()) < 0 or top >= classes:
            raise InvalidInput(
                f"data {name!r}: labels from {int(labels.min())} to {top}, expected 0 to "
                f"{classes - 1}"
            )
        if top >= MOST_CLASSES:
            raise InvalidInput(f"data {name!r}: label {top}, expected less than {MOST_CLASSES}")
        if classes == 1:
            classes, class_names = 2, (*class_names, "other") if class_names else ()
        images, labels = images.contiguous(), labels.contiguous()
        digest = hashlib.sha256(f"{tuple(images.shape)} {images.dtype} {classes}".encode())
        digest.update(images.numpy().data)
        digest.update(labels.numpy().data)
        shape = (images.shape[1], images.shape[2], images.shape[3])
        spec = DataSpec.image(shape, classes, class_names=tuple(class_names))
        return cls(name, images, labels, spec, licence, digest.hexdigest()[:16])

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """Return the examples at `indices`, inputs float32 in [0, 1]."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        images = self.images[chosen]
        if images.dtype == torch.uint8:
            images = images.to(torch.float32) / 255
        return Batch(images, self.labels[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Disjoint indices that cover a dataset.

    Attributes:
        clients: the private pool, from which clients' batches and the identification bank come.
        public: what an attacker may own: class means, nearest public images, priors.
    """

    clients: Tensor
    public: Tensor


def split(dataset: Dataset, seed: int) -> Split:
    """Divide a dataset into halves, class by class, in an order fixed by `seed`.

    Shuffled examples are sorted by class and dealt alternately, so each class, and the whole, is
    divided to within one example.

    Raises:
        InvalidInput: fewer than two examples.
    """
    if len(dataset) < 2:
        raise InvalidInput(f"data {dataset.name!r} has one example: expected at least 2 to split")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator)
    dealt = order[torch.argsort(dataset.labels[order], stable=True)]
    clients, public = dealt[::2], dealt[1::2]
    return Split(
        clients[torch.randperm(len(clients), generator=generator)],
        public[torch.randperm(len(public), generator=generator)],
    )
