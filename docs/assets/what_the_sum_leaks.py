"""Measure what sums of clients leak, and draw what-the-sum-leaks.svg.

python docs/assets/what_the_sum_leaks.py measure DIR [PART ...]   # audits in DIR, resumed if killed
python docs/assets/what_the_sum_leaks.py draw                     # from what-the-sum-leaks.json
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import gradleak as gl
from gradleak.attacks.closed_form.differencing import difference
from gradleak.attacks.closed_form.linear_layer import LinearLayer
from gradleak.attacks.closed_form.lone_rows import written_alone
from gradleak.attacks.labels import LABEL_RULES
from gradleak.attacks.parts.labels import idlg
from gradleak.data import load, split
from gradleak.defenses import TopK, norm
from gradleak.defenses import difference as gl_difference
from gradleak.mechanisms.aggregate import mean as mean_of
from gradleak.metrics.statistics import clustered_mean
from gradleak.models import build
from gradleak.types import Exchange, Knowledge, Observation, Update

FIGURES = Path(__file__).with_name("what-the-sum-leaks.json")
PICTURE = Path(__file__).with_name("what-the-sum-leaks.svg")

AUDITS: dict[str, dict[str, Any]] = {
    "lone-rows": {
        "data": "mnist-5k", "model": "mlp", "attacks": ["lone-rows"], "targets": 8,
        "clients_in_sum": [1, 2, 4, 8, 16, 32],
    },
    "imprint": {
        "data": "mnist-5k", "model": "lenet", "attacks": ["imprint"], "targets": 8,
        "server": "malicious", "clients_in_sum": [1, 4, 16, 64], "knows": "labels",
    },
    "lenet": {
        "data": "mnist-5k", "model": "lenet", "targets": 4, "clients_in_sum": [1, 2, 4],
        "attacks": ["continuation:steps=60"],
    },
    "no-sum": {"data": "mnist-5k", "model": "mlp", "attacks": ["lone-rows"], "targets": 8},
    "colluding": {
        "data": "mnist-5k", "model": "mlp", "attacks": ["lone-rows"], "targets": 8,
        "clients_in_sum": [32], "colluding": 31,
    },
}  # fmt: skip


def audited(name: str, directory: Path) -> list[dict[str, Any]]:
    request = {"defenses": ["none"], "workers": 0, "seed": 0} | AUDITS[name]
    if "clients_in_sum" in request:
        request["view"] = "aggregate"
    report = gl.audit(**request, out=directory / name)
    return [
        {
            "model": f["scenario"]["model"],
            "mechanism": f["scenario"]["mechanism"],
            "data": f["scenario"]["data"],
            "attack": f["attack"],
            "clients": f["scenario"].get("clients", 1),
            "honest": f["scenario"].get("honest_clients", 1),
            "targets": f["trials"]["run"],
            "images": f["trials"]["images"],
            "bank": f["bank_size"],
            "missed": f["missed"],
            "verdict": f["verdict"],
            **{
                metric: {
                    k: f["measurements"][metric].get(k)
                    for k in ("value", "low", "high", "baseline", "control")
                }
                for metric in ("psnr_db", "identified", "recovered")
            },
        }
        for f in report.findings
    ]


def mean(values: list[float], *, together: int = 1) -> dict[str, Any]:
    """Mean and 95 % interval, of which so many neighbours are not independent."""
    clusters = [values[i : i + together] for i in range(0, len(values), together)]
    interval = clustered_mean(clusters)
    value = sum(values) / len(values)
    return {"value": value, "low": interval.low, "high": interval.high, "n": len(clusters)}


def counted() -> list[dict[str, Any]]:
    """Labels of a sum, by every counter, against clients; one example each."""
    data = load("mnist-5k")
    owned = split(data, 0).clients
    rows = []
    state = gl.ModelState.of(build("mlp", data.spec, seed=1))
    names = ["llg-star", "zlg", "ilrg", "bias-counts", "llg"]
    for n in (1, 4, 16, 64):
        found: dict[str, list[float]] = {}
        for t in range(8):
            indices = owned[torch.arange(n) * 16 + t]
            seen, truth = gl.simulate(
                gl.Scenario(
                    data,
                    state,
                    threat=gl.ThreatModel(view="aggregate"),
                    indices=indices,
                    clients=n,
                ),
                generator=torch.Generator().manual_seed(t),
            )
            true = truth.batch.classes.bincount(minlength=10)
            for name in names:
                if name not in LABEL_RULES:
                    continue
                try:
                    counts = LABEL_RULES[name]()(seen, generator=torch.Generator().manual_seed(t))
                except gl.NotApplicable:
                    continue
                share = float(torch.minimum(counts, true).sum()) / n
                found.setdefault(name, []).append(share)
            guess = torch.minimum(torch.full((10,), n / 10), true.float()).sum() / n
            found.setdefault("uniform guess", []).append(float(guess))
        rows += [{"clients": n, "rule": k, "accuracy": mean(v)} for k, v in found.items()]
    return rows


def differenced() -> list[dict[str, Any]]:
    """Single updates from sums over random halves of ten clients, against rounds."""
    data = load("mnist-5k")
    owned = split(data, 0).clients
    everyone, take, watched = 10, 5, 4
    ends = (4, 8, 10, 12, 16, 24)
    first = gl.ModelState.of(build("mlp", data.spec, seed=1))
    settings: dict[str, tuple[float, bool]] = {
        "same batch, same weights": (0.0, False),
        "same batch, learning rate 0.01": (0.01, False),
        "same batch, learning rate 0.1": (0.1, False),
        "fresh batches": (0.0, True),
    }
    rows = []
    for name, (rate, fresh) in settings.items():
        found: dict[int, dict[str, list[float]]] = {end: {} for end in ends}
        for trial in range(6):
            stream = torch.Generator().manual_seed(trial)
            own = [data.batch(owned[[trial * everyone + i]]) for i in range(everyone)]
            true = [gl.FedSGD().mean(first, batch) for batch in own[:watched]]
            state, sums, weights = first, [], torch.zeros(ends[-1], everyone)
            for t in range(ends[-1]):
                present = torch.randperm(everyone, generator=stream)[:take].tolist()
                weights[t, present] = 1 / take
                place = 60 + (trial * ends[-1] + t) * everyone
                batches = [data.batch(owned[[place + i]]) if fresh else own[i] for i in present]
                sums.append(mean_of(gl.FedSGD().mean(state, batch) for batch in batches))
                moved = {k: p - rate * sums[-1].values[k] for k, p in state.params.items()}
                state = replace(state, params=moved)
            for end, row in found.items():
                solved = difference(sums[:end], weights[:end])
                for i in range(watched):
                    for measure, value in scored(
                        solved.updates[i], true[i], own[i], first, data.spec
                    ).items():
                        row.setdefault(measure, []).append(value)
                    row.setdefault("solvable", []).append(float(solved.exact[i]))
        rows += [
            {"setting": name, "rounds": end}
            | {measure: mean(values, together=watched) for measure, values in row.items()}
            for end, row in found.items()
        ]
    return rows


def scored(
    claim: Update, true: Update, batch: gl.Batch, state: gl.ModelState, spec: gl.DataSpec
) -> dict[str, float]:
    """How near a single update, its image and its label are."""
    seen = Observation((Exchange(state, claim),), gl.FedSGD(), spec, Knowledge(batch_size=1))
    image = LinearLayer()(seen, generator=torch.Generator()).batch.inputs
    mse = float((image - batch.inputs).square().mean())
    return {
        "error": norm(gl_difference(claim, true)) / norm(true),
        "psnr_db": min(200.0, -10 * math.log10(max(mse, 1e-20))),
        "label": float(idlg(seen) == batch.labels),
    }


def alone() -> list[dict[str, Any]]:
    """Of the coordinates that top-k sends, the share that one client alone wrote."""
    data = load("mnist-5k")
    owned = split(data, 0).clients
    state = gl.ModelState.of(build("lenet", data.spec, seed=1))
    rows = []
    for fraction in (0.01, 0.1):
        for n in (2, 8, 32):
            shares = []
            for t in range(4):
                sent = [
                    TopK(fraction)(gl.FedSGD()).mean(state, data.batch(owned[[t * 64 + i]]))
                    for i in range(n)
                ]
                supports = {k: torch.stack([u.values[k] != 0 for u in sent]) for k in state.params}
                owner = written_alone(supports)
                kept = sum(int(s.sum()) for s in supports.values())
                shares.append(sum(int((o >= 0).sum()) for o in owner.values()) / kept)
            rows.append({"fraction": fraction, "clients": n, "alone": mean(shares)})
    return rows


OTHERS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "labels": counted,
    "differencing": differenced,
    "alone": alone,
}


def measure(directory: Path, only: list[str]) -> None:
    torch.set_num_threads(1)
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in only or [*AUDITS, *OTHERS]:
        started = time.process_time()
        rows = OTHERS[name]() if name in OTHERS else audited(name, directory)
        known[name] = {"cpu_seconds": round(time.process_time() - started, 1), "rows": rows}
        FIGURES.write_text(json.dumps(known, indent=1) + "\n")
        print(name, known[name]["cpu_seconds"], flush=True)


COLOURS = ("#2b5fa8", "#b4531f", "#3b7d4a", "#7a4fa0", "#8a94a3")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 330, 250, 52, 34, 208
"""Of one panel, pixels."""

Line = list[tuple[int, dict[str, float]]]
"""Points of a line: a count, and a value with its interval."""


def panel(
    offset: int, title: str, ticks: list[int], lines: dict[str, Line], *, axis: str, top: float
) -> str:
    """One panel: values up to `top` over counts."""
    right = WIDTH - 12

    def x(count: int) -> float:
        return LEFT + (right - LEFT) * (ticks.index(count) + 0.5) / len(ticks)

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * min(max(value, 0.0), top) / top

    body = f'<g transform="translate({offset} 0)"><text x="{LEFT}" y="16" font-weight="bold">'
    body += f"{title}</text>"
    for step in range(5):
        level = top * step / 4
        body += f'<path d="M{LEFT} {y(level):.1f}H{right}" stroke="#dde3ea"/>'
        words = f"{100 * level:.0f} %" if top == 1 else f"{level:.0f}"
        body += f'<text x="{LEFT - 6}" y="{y(level) + 4:.1f}" text-anchor="end">{words}</text>'
    for tick in ticks:
        body += f'<text x="{x(tick):.1f}" y="{BOTTOM + 16}" text-anchor="middle">{tick}</text>'
    body += f'<text x="{(LEFT + right) / 2}" y="{BOTTOM + 34}" text-anchor="middle">{axis}</text>'
    for number, (label, points) in enumerate(lines.items()):
        colour = COLOURS[number]
        path = "L".join(f"{x(n):.1f} {y(m['value']):.1f}" for n, m in points)
        body += f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for n, m in points:
            ends = f"M{x(n):.1f} {y(m['low']):.1f}V{y(m['high']):.1f}"
            body += f'<path d="{ends}" stroke="{colour}"/>'
            body += f'<circle cx="{x(n):.1f}" cy="{y(m["value"]):.1f}" r="3" fill="{colour}"/>'
        level = HEIGHT + 16 + 16 * number
        body += f'<path d="M{LEFT} {level - 4}h20" stroke="{colour}" stroke-width="2"/>'
        body += f'<text x="{LEFT + 26}" y="{level}">{label}</text>'
    return body + "</g>"


def against_clients(known: dict[str, Any], metric: str) -> dict[str, Line]:
    """A line per attack that was audited, the stronger of several at every point."""
    lines: dict[str, Line] = {}
    for part, label in (
        ("lenet", "LeNet, MNIST: continuation"),
        ("lone-rows", "perceptron, MNIST: lone rows"),
        ("imprint", "LeNet, MNIST: imprint, malicious"),
    ):
        best: dict[int, dict[str, Any]] = {}
        for row in known.get(part, {"rows": []})["rows"]:
            old = best.get(row["clients"])
            if old is None or row["psnr_db"]["value"] > old["psnr_db"]["value"]:
                best[row["clients"]] = row
        if best:
            lines[label] = [(n, row[metric]) for n, row in sorted(best.items())]
    return lines


def draw() -> None:
    """Recovery against clients, against rounds of differencing."""
    known = json.loads(FIGURES.read_text())
    ticks = sorted({n for line in against_clients(known, "recovered").values() for n, _ in line})
    lines: dict[str, Line] = {}
    for row in known["differencing"]["rows"]:
        lines.setdefault(row["setting"], []).append((row["rounds"], row["psnr_db"]))
    rounds = [n for n, _ in next(iter(lines.values()))]
    panels = [
        panel(0, "PSNR (dB)", ticks, against_clients(known, "psnr_db"),
              axis="clients in the sum", top=60),
        panel(WIDTH, "images recovered", ticks, against_clients(known, "recovered"),
              axis="clients in the sum", top=1),
        panel(2 * WIDTH, "differencing, PSNR (dB)", rounds, lines,
              axis="rounds, 5 of 10 clients in each", top=60),
    ]  # fmt: skip
    width, height = 3 * WIDTH, HEIGHT + 80
    PICTURE.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" fill="#1c2430">'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>{"".join(panels)}</svg>\n'
    )


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure(Path(sys.argv[2]), sys.argv[3:])
    else:
        draw()
