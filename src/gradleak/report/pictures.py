"""Pictures of targets, from the stored tensors to PNG data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradleak.metrics import MISSING, align
from gradleak.types import Batch

ROLES = ("original", "truth", "claim", "control", "baseline")
LARGEST_SIDE = 128
"""Pixels; a larger image is reduced for display."""
MOSAIC = 16
"""Images of one batch that are shown."""

Images = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Picture:
    """One PNG as a data URI, with its size in pixels; `uri` is empty when nothing can be drawn."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors of one finding, one row per target, or why they cannot be shown.

    Attributes:
        images: role -> (targets, b, C, H, W) in [0, 1]; empty when there are none.
        problem: one line, or "" when all is well.
    """

    images: Mapping[str, Images]
    problem: str = ""


def load(directory: Path, places: Sequence[tuple[str | None, int]]) -> Stored:
    """Read the tensors of one finding; never raises, a missing picture is only said.

    Args:
        directory: where the paths start; none may lead outside.
        places: file and row of each target, None for a target without a file.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys(path for path, _ in places if path):
        file = (directory / name).resolve()
        if not file.is_relative_to(directory.resolve()):
            return Stored({}, f"{name} lies outside the result directory")
        try:
            files[name] = load_file(file)
        except (OSError, SafetensorError):
            return Stored({}, f"{name} is missing or damaged")
    roles = [role for role in ROLES if files and all(role in file for file in files.values())]
    if "claim" not in roles:
        return Stored({}, "none were stored")
    shape = next(iter(files.values()))["claim"].shape[1:]
    images: dict[str, Images] = {}
    for role in roles:
        rows = []
        for path, row in places:
            stored = files[path][role] if path else torch.full((1, *shape), math.nan)
            row = row if path else 0
            if stored.ndim != 5 or stored.shape[1:] != shape or not 0 <= row < len(stored):
                return Stored({}, "the stored tensors are not images of one shape, one per target")
            if role == "original" or "truth" not in roles:
                rows.append(stored[row])
                continue
            truth = files[path]["truth"][row] if path else stored[0]
            rows.append(_aligned(stored[row], truth))
        images[role] = torch.stack(rows).to(torch.float64).numpy()
    return Stored(images)


def _aligned(claim: Tensor, truth: Tensor) -> Tensor:
    """Order the claims of one batch like the truth, nan where nothing finite was claimed."""
    labels = torch.zeros(len(truth), dtype=torch.int64)
    order = align(Batch(claim, labels), Batch(truth, labels))
    aligned = claim[order].clone()
    aligned[order == MISSING] = math.nan
    return aligned


def mosaic(batch: Images) -> Picture:
    """Draw one batch (b, C, H, W) as a near-square mosaic; what is not finite stays white."""
    if not np.isfinite(batch).any():
        return Picture("", 0, 0)
    shown = np.nan_to_num(batch[:MOSAIC], nan=1.0)
    columns = math.ceil(math.sqrt(len(shown)))
    return _tiled(shown, columns)


def strip(batches: Sequence[Images]) -> Picture:
    """Draw the first image of several batches side by side; what is not finite stays empty."""
    return _tiled(np.stack([np.nan_to_num(batch[0], nan=1.0) for batch in batches]), len(batches))


def _tiled(images: Images, columns: int) -> Picture:
    colour = images.shape[1] == 3
    pixels = images if colour else images.mean(axis=1, keepdims=True)
    pixels = (np.clip(pixels, 0.0, 1.0) * 255).round().astype(np.uint8)
    _, channels, height, width = pixels.shape
    rows = math.ceil(len(pixels) / columns)
    gap = 0 if len(pixels) == 1 else max(1, round(width / 16))
    canvas = np.zeros(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels + 1), np.uint8
    )
    for position, image in enumerate(pixels):
        top, left = position // columns * (height + gap), position % columns * (width + gap)
        canvas[top : top + height, left : left + width, :channels] = image.transpose(1, 2, 0)
        canvas[top : top + height, left : left + width, channels] = 255
    drawn = Image.fromarray(canvas, "RGBA" if colour else "LA")
    if max(height, width) > LARGEST_SIDE:
        scale = LARGEST_SIDE / max(height, width)
        size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
        drawn = drawn.resize(size, Image.Resampling.LANCZOS)
    if gap == 0:
        drawn = drawn.convert("RGB" if colour else "L")
    buffer = io.BytesIO()
    drawn.save(buffer, "PNG", optimize=True)
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(uri, drawn.width, drawn.height)


def chosen(psnr_db: Sequence[float], *, key: str) -> list[tuple[str, int]]:
    """Choose the targets to show by rule: worst, median and random by PSNR.

    *Worst* is the highest PSNR (for the client), *median* the lower median, *random* is drawn
    among the remaining targets by a generator seeded with `key` alone.

    Args:
        psnr_db: one value per target; nan ranks lowest.
        key: the finding's identifier.

    Returns:
        (role, index of the target), each target once.
    """
    if not psnr_db:
        return []
    order = sorted(
        range(len(psnr_db)),
        key=lambda i: (-math.inf if math.isnan(psnr_db[i]) else psnr_db[i], -i),
    )
    picks = [("Worst", order[-1])]
    if len(order) > 1:
        picks.append(("Median", order[(len(order) - 1) // 2]))
    rest = sorted(set(range(len(psnr_db))) - {index for _, index in picks})
    if rest:
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        picks.append(("Random", random.Random(seed).choice(rest)))
    return picks
