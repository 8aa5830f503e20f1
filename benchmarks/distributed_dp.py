"""Error of a noisy sum at equal ε: integer noise of the clients against a curator's Gaussian.

The noise multiplier of every mechanism is the smallest whose accounted ε (one round, δ = 1e-5, all
clients alive) is the given one; what is measured is the mean squared error per coordinate of the
decoded sum of 32 clipped vectors, over z², that of the continuous Gaussian added centrally.

    python benchmarks/distributed_dp.py measure distributed_dp.json
    python benchmarks/distributed_dp.py draw distributed_dp.json distributed-dp.svg
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

from gradleak.crypto.distributed_dp import DistributedNoise, Noise
from gradleak.errors import InvalidInput
from gradleak.metrics import distributed_epsilon, epsilon

CLIENTS, DELTA, COORDINATES = 32, 1e-5, 50_000
NOISES: tuple[Noise, ...] = ("discrete-gaussian", "skellam")


def synthetic() -> np.ndarray:
    """Unit vectors of 60000 Gaussian entries."""
    made = np.random.default_rng(0).normal(size=(CLIENTS, 60_000))
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


def gradients() -> np.ndarray:
    """Of `lenet` at its first weights, 8 images of mnist-5k per client; norm 1 at the median."""
    import torch

    from gradleak.data.embedded import mnist_5k
    from gradleak.models.lenet import lenet

    torch.manual_seed(0)
    data = mnist_5k()
    network = lenet(data.spec)
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(1))
    rows = []
    for part in torch.split(chosen[: 8 * CLIENTS], 8):
        images = data.images[part].float() / 255
        loss = torch.nn.functional.cross_entropy(network(images), data.labels[part])
        found = torch.autograd.grad(loss, list(network.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]).double().numpy())
    made = np.stack(rows)
    return np.asarray(made / np.median(np.linalg.norm(made, axis=1)))


def clipped(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors * np.minimum(1.0, 1.0 / norms))


def accounted(encoding: DistributedNoise) -> float:
    return distributed_epsilon(
        DELTA,
        noise=encoding.noise,
        variance=encoding.variance,
        survivors=CLIENTS,
        norm2=encoding.norm2,
        length=encoding.length,
    )


def calibrated(target: float, **settings: Any) -> DistributedNoise | None:
    """The least noise with this ε; None where the grid is too coarse for any."""

    def made(log_multiplier: float) -> DistributedNoise:
        return DistributedNoise(CLIENTS, multiplier=math.exp(log_multiplier), **settings)

    try:
        root = brentq(
            lambda z: math.log(accounted(made(z)) / target), math.log(0.05), math.log(60), xtol=1e-6
        )
        return made(root)
    except (InvalidInput, ValueError):
        return None


def measured(vectors: np.ndarray, encoding: DistributedNoise) -> tuple[float, float]:
    """Mean squared error per coordinate, and CPU seconds of a client."""
    kept, errors, began = clipped(vectors).sum(axis=0), [], time.process_time()
    repeats = -(-COORDINATES // encoding.length)
    for _ in range(repeats):
        whole = sum(encoding.encode(v) for v in vectors)
        wrapped = (whole + 2 ** (encoding.bits - 1)) % 2**encoding.bits - 2 ** (encoding.bits - 1)
        errors.append(np.mean((encoding.decode(wrapped, clients=CLIENTS) - kept) ** 2))
    return float(np.mean(errors)), (time.process_time() - began) / repeats / CLIENTS


def measure(path: Path) -> None:
    rows: list[dict[str, Any]] = []
    cells = [
        (data, target, bits, rotate)
        for data in ("synthetic", "lenet")
        for target in (1.0, 8.0)
        for bits in (14, 16, 20, 24)
        for rotate in (True, False)
        if rotate or (data == "synthetic" and bits < 20)
    ]
    vectors = {"synthetic": synthetic(), "lenet": gradients()}
    for data, target, bits, rotate in cells:
        length = vectors[data].shape[1]
        z = brentq(lambda m: epsilon(DELTA, noise_multiplier=m) - target, 0.05, 60)  # noqa: B023
        for noise in NOISES:
            encoding = calibrated(
                target,
                length=length,
                bits=bits,
                noise=noise,
                rotation=bytes(range(32)) if rotate else None,
            )
            row = {
                "data": data,
                "length": length,
                "epsilon": target,
                "bits": bits,
                "rotation": rotate,
                "noise": noise,
                "central_multiplier": z,
            }
            if encoding is not None:
                error, seconds = measured(vectors[data], encoding)
                row |= {
                    "multiplier": encoding.multiplier,
                    "grid_deviation": math.sqrt(encoding.variance),
                    "ratio": error / z**2,
                    "standard_error": math.sqrt(2 / length / -(-COORDINATES // length)),
                    "client_seconds": seconds,
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def draw(source: Path, target: Path) -> None:
    from matplotlib import pyplot

    rows = [r for r in json.loads(source.read_text()) if r["data"] == "synthetic"]
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True)
    for panel, wanted in zip(panels, (1.0, 8.0), strict=True):
        for noise, colour in zip(NOISES, ("C0", "C1"), strict=True):
            for rotate, style in ((True, "o-"), (False, "s:")):
                line = [
                    (r["bits"], r["ratio"])
                    for r in rows
                    if (r["noise"], r["rotation"], r["epsilon"]) == (noise, rotate, wanted)
                    and "ratio" in r
                ]
                label = noise + ("" if rotate else ", no rotation")
                panel.plot(*zip(*line, strict=True), style, color=colour, label=label)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_yticks([1, 1.2, 1.5, 2, 3], ["1", "1.2", "1.5", "2", "3"])
        panel.minorticks_off()
        panel.set_xticks([14, 16, 20, 24])
        panel.set_xlabel("bits of a coordinate of the sum")
        panel.set_title(f"ε = {wanted:g}", fontsize=10)
    panels[0].set_ylabel("error over central Gaussian")
    panels[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure(Path(sys.argv[2]))
    else:
        draw(Path(sys.argv[2]), Path(sys.argv[3]))
