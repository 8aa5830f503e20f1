"""Measure the tables of docs/differential-privacy.md and draw its picture.

    python docs/assets/differential_privacy.py measure DIR [PANEL ...]
    python docs/assets/differential_privacy.py draw DIR

Every audit has a directory of its own below DIR; the same command goes on after the last.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import brentq

import gradleak as gl
from gradleak.data import load, split
from gradleak.defenses import DPSGD, Sent
from gradleak.metrics import clopper_pearson, epsilon, gaussian_ceiling
from gradleak.models import build
from gradleak.types import Batch, ModelState, Update

EPSILONS = (1, 3, 10, 100, 1000)
DELTA, NORM, TRIALS, BANK = 1e-5, 1.0, 600, 100
ADAM = "inverting-gradients:steps=150"
SURROGATE = "sme:steps=150"


def multiplier(target: float) -> float:
    """Noise multiplier of which one update has this ε."""
    spent: Callable[[float], float] = lambda m: epsilon(DELTA, noise_multiplier=m) - target
    return float(brentq(spent, 0.005, 50))


def audits() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and request of every audit, by panel."""
    common = {"data": "mnist-5k", "knows": "labels", "workers": 0, "seed": 3}
    defenses = [f"dp-sgd:norm={NORM:g},noise_multiplier={multiplier(e):.4g}" for e in EPSILONS]
    attacks = ["linear-layer", ADAM, "bayes:steps=150,decay=0.97"]
    yield (
        "epsilon",
        common | {"model": "mlp", "attacks": attacks, "defenses": defenses, "targets": 16},
    )
    for size in (1, 4, 16, 64):
        batch = common | {"batch_size": size, "targets": 8, "defenses": "none"}
        yield f"batch/mlp-{size}", batch | {"model": "mlp", "attacks": ["linear-layer", ADAM]}
        yield f"batch/lenet-{size}", batch | {"model": "lenet", "attacks": ADAM}
    for size in (1, 4, 16):
        colour = common | {"data": "cifar10", "model": "convnet", "batch_size": size, "targets": 8}
        yield f"batch/cifar-{size}", colour | {"attacks": ADAM, "defenses": "none"}
    for steps in (1, 5, 20):
        local = common | {"batch_size": 4, "targets": 8, "defenses": "none", "mechanism": "fedavg"}
        local |= {"local_steps": steps, "local_learning_rate": 0.05}
        yield f"steps/mlp-{steps}", local | {"model": "mlp", "attacks": ["linear-layer", SURROGATE]}
        yield f"steps/lenet-{steps}", local | {"model": "lenet", "attacks": [ADAM, SURROGATE]}


def measure(place: Path, panels: list[str]) -> None:
    """Run every audit of some panels, and the informed adversaries with "informed"."""
    torch.set_num_threads(1)
    for name, request in audits():
        if panels and name.partition("/")[0] not in panels:
            continue
        gl.audit(**request, out=place / name)
        print(name, flush=True)
    if not panels or "informed" in panels:
        found = {kind: [informed(kind, e) for e in EPSILONS] for kind in ("canaries", "images")}
        (place / "informed.json").write_text(json.dumps(found))


def informed(kind: str, target: float) -> list[int]:
    """Hits and trials of an adversary who has the candidates: the likeliest under the update."""
    rows = torch.eye(BANK) if kind == "canaries" else gradients()
    client = DPSGD(NORM, multiplier(target))
    means = client(Sent(Update({"u": rows[0]}, "gradient"))).inner.rule  # type: ignore[attr-defined]
    clipped = torch.stack([means.map({"u": row})["u"] for row in rows])
    generator = torch.Generator().manual_seed(0)
    noise, hits = client.noise(1), 0
    for trial in range(TRIALS):
        true = trial % BANK
        sent = clipped[true] + noise.draw(clipped[true], generator)
        hits += int((clipped - sent).square().sum(1).argmin()) == true
    return [hits, TRIALS]


def gradients() -> torch.Tensor:
    """Updates of 100 clients' images, (100, parameters)."""
    data = load("mnist-5k")
    state = ModelState.of(build("mlp", data.spec, seed=1))
    bank = data.batch(split(data, 7).clients[:BANK])
    each = [
        gl.FedSGD().mean(state, Batch(x[None], y[None])).values
        for x, y in zip(bank.inputs, bank.labels)
    ]
    return torch.stack([torch.cat([v.flatten() for v in one.values()]) for one in each])


def findings(place: Path, panel: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of the audit, and each of its findings."""
    for name, _ in audits():
        path = place / name / "result.json"
        if name.partition("/")[0] == panel and path.exists():
            for finding in json.loads(path.read_text())["findings"]:
                yield name, finding


def figures(finding: dict[str, Any]) -> str:
    """Mean, its interval and the worst image, in dB, and the share identified."""
    m = finding["measurements"]
    psnr, seen = m["psnr_db"], m["identified"]
    return (
        f"{psnr['value']:.1f} ({psnr['low']:.1f} to {psnr['high']:.1f}) dB, "
        f"worst {psnr['quantiles']['worst_case']:.1f} dB, "
        f"identified {seen['value']:.0%} ({seen['low']:.0%} to {seen['high']:.0%}), "
        f"n = {psnr['n']}, {psnr['images']} images, guess {psnr['baseline']:.1f} dB"
    )


def table(place: Path) -> None:
    """Print everything that the page quotes."""
    for panel in ("epsilon", "batch", "steps"):
        for name, finding in findings(place, panel):
            print(name, finding["defense_spec"], finding["attack"], finding["verdict"])
            print("   ", figures(finding), [x["limit"] for x in finding["limits"]])
    for kind, counts in json.loads((place / "informed.json").read_text()).items():
        for target, (hits, trials) in zip(EPSILONS, counts, strict=True):
            m = multiplier(target)
            seen = clopper_pearson(hits, trials, confidence=0.998)
            ceiling = gaussian_ceiling(1 / BANK, noise_multiplier=m)
            print(f"{kind} ε={target} m={m:.3f}: {hits / trials:.1%}", end=" ")
            print(f"({seen.low:.1%} to {seen.high:.1%}), ceiling {ceiling:.1%}")


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2])
    {"measure": lambda: measure(place, sys.argv[3:]), "table": lambda: table(place)}[verb]()
