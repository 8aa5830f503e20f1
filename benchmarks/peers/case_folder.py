"""A case on disk, as both environments read it: torch, safetensors and gradleak's networks."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
from gradleak import models
from gradleak.types import DataSpec


def gradient_file(folder: Path, image: int) -> Path:
    """Where the gradient of one image lies, tensors named as the network's parameters."""
    return folder / f"gradient-{image:02d}.safetensors"


def read_case(folder: Path) -> tuple[nn.Sequential, DataSpec, dict[str, Tensor]]:
    """Rebuild the network with the case's weights in evaluation mode, and read the truth."""
    case = json.loads((folder / "case.json").read_text())
    channels, height, width = case["shape"]
    spec = DataSpec.image((channels, height, width), case["classes"])
    network = models.build(case["model"], spec, seed=0)
    if not isinstance(network, nn.Sequential):
        raise SystemExit(f"{case['model']} is no sequence of layers: expected convnet or resnet18")
    network.load_state_dict(load_file(folder / "state.safetensors"))
    return network.eval(), spec, load_file(folder / "truth.safetensors")


def psnr_db(claim: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio of one image, claim clamped into [0, 1], peak 1."""
    mse = float((claim.double().clamp(0, 1) - image.double()).square().mean())
    return -10 * math.log10(mse) if mse else math.inf


def results(folder: Path) -> Iterator[dict[str, Any]]:
    """Results so far, one per attack, number of iterations and image."""
    file = folder / "results.jsonl"
    if file.exists():
        yield from map(json.loads, file.read_text().splitlines())


def done(folder: Path, attack: str, iterations: int, image: int) -> bool:
    """Whether this result is stored already, so that an interrupted run resumes."""
    key = (attack, iterations, image)
    return any((r["attack"], r["iterations"], r["image"]) == key for r in results(folder))


def append(
    folder: Path,
    attack: str,
    iterations: int,
    image: int,
    claim: Tensor,
    images: Tensor,
    seconds: float,
) -> None:
    """Store one claim (1, C, H, W) and print its PSNR."""
    name = f"{attack.replace(' ', '-')}-{iterations}-{image:02d}.safetensors"
    (folder / "claims").mkdir(exist_ok=True)
    save_file({"claim": claim.detach().float().contiguous()}, folder / "claims" / name)
    psnr = psnr_db(claim[0], images[image])
    row = {
        "attack": attack,
        "iterations": iterations,
        "image": image,
        "psnr_db": psnr,
        "cpu_seconds": seconds,
        "claim": name,
    }
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{attack}, image {image}: {psnr:.2f} dB, {seconds:.1f} CPU s", flush=True)
