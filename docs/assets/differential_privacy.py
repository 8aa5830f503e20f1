"""Measure the tables of docs/differential-privacy.md and draw its picture.

    python docs/assets/differential_privacy.py measure DIR [PANEL ...]
    python docs/assets/differential_privacy.py table DIR
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
from gradleak.defenses import DPSGD, Clip
from gradleak.metrics import clopper_pearson, epsilon, gaussian_ceiling
from gradleak.models import build
from gradleak.types import Batch, ModelState

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
    """Hits and trials of an adversary who has the candidates: the likeliest under the update.

    Noise matters in the span of the candidates c_i alone: ⟨c, noise⟩ has covariance σ² c cᵀ.
    """
    rows = (torch.eye(BANK) if kind == "canaries" else gradients()).double()
    client = DPSGD(NORM, multiplier(target))
    clipped = torch.stack([Clip(client.norm).map({"u": row})["u"] for row in rows])
    gram = clipped @ clipped.T
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()
    true = torch.arange(TRIALS) % BANK
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((TRIALS, BANK), generator=generator, dtype=torch.float64)
    scores = gram[true] + client.noise(1).std * normal @ root.T
    return [int((scores - gram.diagonal() / 2).argmax(1).eq(true).sum()), TRIALS]


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


BLUE, RED, GREEN, GREY = "#2b5fa8", "#b4531f", "#2f7d4f", "#8a94a3"
Series = tuple[str, str, list[tuple[float, float, float]]]
"""Name, colour, and (value, low, high) by position."""


def draw(place: Path, target: Path) -> None:
    """Identification against ε beside its ceiling; PSNR against batch size and local steps."""
    counts = json.loads((place / "informed.json").read_text())
    ceiling = [gaussian_ceiling(1 / BANK, noise_multiplier=multiplier(e)) for e in EPSILONS]
    shares = [
        ("ceiling, one update", GREEN, [(100 * c, 100 * c, 100 * c) for c in ceiling]),
        ("canaries, told apart by likelihood", RED, [share(*c) for c in counts["canaries"]]),
        ("images, told apart by likelihood", BLUE, [share(*c) for c in counts["images"]]),
        ("images, best reconstruction", GREY, [best(place, e) for e in EPSILONS]),
    ]
    sizes = {size: spread(place, f"batch/lenet-{size}") for size in (1, 4, 16, 64)}
    local = {
        steps: spread(place, name)
        for steps in (1, 5, 20)
        if (place / (name := f"steps/lenet-{steps}") / "result.json").exists()
    }
    parts = panel(0, "identified of 100 (%)", "ε of one update, δ = 1e-5", EPSILONS, shares, 100)
    for left, label, found in ((1, "batch size", sizes), (2, "local steps, batch 4", local)):
        lines = [
            ("mean", BLUE, [mean for mean, _ in found.values()]),
            ("worst image", RED, [(worst, worst, worst) for _, worst in found.values()]),
        ]
        parts += panel(left, "PSNR (dB), lenet, no protection", label, tuple(found), lines, 50)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 340" '
    head += 'font-family="sans-serif" font-size="12" fill="#1c2430">'
    body = [head, '<rect width="960" height="340" fill="#ffffff"/>', *parts, "</svg>"]
    target.write_text("\n".join(body) + "\n")


def share(hits: int, trials: int) -> tuple[float, float, float]:
    """A share and its 99.8 % interval, in per cent."""
    seen = clopper_pearson(hits, trials, confidence=0.998)
    return 100 * hits / trials, 100 * seen.low, 100 * seen.high


def best(place: Path, target: float) -> tuple[float, float, float]:
    """The most that one of the attacks identified at this ε, in per cent."""
    spec = f"noise_multiplier={multiplier(target):.4g},"
    seen = [
        finding["measurements"]["identified"]
        for _, finding in findings(place, "epsilon")
        if spec in finding["defense_spec"]
    ]
    most = max(seen, key=lambda m: float(m["value"]))
    return 100 * most["value"], 100 * most["low"], 100 * most["high"]


def spread(place: Path, name: str) -> tuple[tuple[float, float, float], float]:
    """Mean PSNR of the better attack with its interval, and the worst image of both, in dB."""
    panel_of = name.partition("/")[0]
    seen = [
        finding["measurements"]["psnr_db"]
        for audit, finding in findings(place, panel_of)
        if audit == name
    ]
    top = max(seen, key=lambda m: float(m["value"]))
    worst = max(float(m["quantiles"]["worst_case"]) for m in seen)
    return (top["value"], top["low"], top["high"]), worst


def panel(
    number: int,
    title: str,
    label: str,
    positions: tuple[float, ...],
    lines: list[Series],
    highest: float,
) -> list[str]:
    """One chart; positions are evenly spaced."""
    left, top, width, height = 40 + 320 * number, 40, 250, 180

    def up(value: float) -> float:
        return top + height * (1 - min(max(value, 0), highest) / highest)

    parts = [f'<text x="{left - 24}" y="20" font-weight="bold">{title}</text>']
    for tick in range(0, int(highest) + 1, int(highest) // 5):
        parts.append(
            f'<path d="M{left} {up(tick):.0f}H{left + width}" stroke="#dde3ea"/>'
            f'<text x="{left - 6}" y="{up(tick) + 4:.0f}" text-anchor="end">{tick}</text>'
        )
    across = [left + 20 + (width - 40) * i / (len(positions) - 1) for i in range(len(positions))]
    for x, position in zip(across, positions, strict=True):
        parts.append(
            f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{position}</text>'
        )
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">{label}</text>'
    )
    for place, (name, colour, values) in enumerate(lines):
        spots = [(x + 4 * (place - 1), up(v)) for x, (v, _, _) in zip(across, values, strict=True)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        for (x, y), (_, low, high) in zip(spots, values, strict=True):
            parts.append(
                f'<path d="M{x:.1f} {up(low):.1f}V{up(high):.1f}" stroke="{colour}"/>'
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
            )
        beneath = top + height + 58 + 16 * place
        parts.append(
            f'<circle cx="{left}" cy="{beneath - 4}" r="4" fill="{colour}"/>'
            f'<text x="{left + 10}" y="{beneath}">{name}</text>'
        )
    return parts


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2])
    {
        "measure": lambda: measure(place, sys.argv[3:]),
        "table": lambda: table(place),
        "draw": lambda: draw(place, Path(__file__).with_name("differential-privacy.svg")),
    }[verb]()
