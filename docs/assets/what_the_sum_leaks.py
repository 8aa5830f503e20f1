"""Measure what sums of clients leak, and draw what-the-sum-leaks.svg.

python docs/assets/what_the_sum_leaks.py measure DIR [PART ...]   # audits in DIR, resumed if killed
python docs/assets/what_the_sum_leaks.py draw                     # from what-the-sum-leaks.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
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
from gradleak.defenses import TopK
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
    "spear": {
        "data": "mnist-5k", "model": "mlp", "attacks": ["spear"], "targets": 8,
        "clients_in_sum": [1, 2, 4, 8],
    },
    "imprint": {
        "data": "mnist-5k", "model": "lenet", "attacks": ["imprint"], "targets": 8,
        "server": "malicious", "clients_in_sum": [1, 4, 16, 64],
    },
    "imprint-cifar10": {
        "data": "cifar10", "model": "convnet", "attacks": ["imprint"], "targets": 8,
        "server": "malicious", "clients_in_sum": [1, 8, 64],
    },
    "lenet": {
        "data": "mnist-5k", "model": "lenet", "targets": 8, "clients_in_sum": [1, 2, 4, 8],
        "attacks": ["inverting-gradients:steps=400", "continuation:steps=150"],
    },
    "convnet": {
        "data": "cifar10", "model": "convnet", "targets": 8, "clients_in_sum": [1, 2, 4, 8],
        "attacks": ["inverting-gradients:steps=300"],
    },
    "fedavg": {
        "data": "mnist-5k", "model": "mlp", "attacks": ["lone-rows"], "targets": 8,
        "mechanism": "fedavg", "clients_in_sum": [1, 2, 4, 8, 16, 32],
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
    for n in (1, 2, 4, 8, 16, 32, 64):
        found: dict[str, list[float]] = {}
        for t in range(16):
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
    everyone, take, most = 10, 5, 24
    settings: dict[str, tuple[float, bool]] = {
        "same batch, same weights": (0.0, False),
        "same batch, learning rate 0.01": (0.01, False),
        "same batch, learning rate 0.1": (0.1, False),
        "fresh batches": (0.0, True),
    }
    rows = []
    for name, (rate, fresh) in settings.items():
        errors: dict[int, list[float]] = {}
        psnr: dict[int, list[float]] = {}
        exact: dict[int, list[float]] = {}
        labels: dict[int, list[float]] = {}
        for trial in range(6):
            stream = torch.Generator().manual_seed(trial)
            first = state = gl.ModelState.of(build("mlp", data.spec, seed=1))
            own = [int(owned[trial * everyone + i]) for i in range(everyone)]
            sums, weights = [], torch.zeros(most, everyone)
            for t in range(most):
                present = torch.randperm(everyone, generator=stream)[:take].tolist()
                weights[t, present] = 1 / take
                each = {}
                for i in present:
                    index = own[i]
                    if fresh:
                        index = int(owned[60 + (trial * most + t) * everyone + i])
                    each[i] = gl.FedSGD().mean(state, data.batch(torch.tensor([index])))
                total = {k: sum(u.values[k] for u in each.values()) / take for k in state.params}
                sums.append(Update(total, "gradient"))
                moved = {k: p - rate * total[k] for k, p in state.params.items()}
                state = gl.ModelState(state.model, moved, state.buffers)
            for rounds in (1, 2, 4, 6, 8, 10, 12, 16, 20, 24):
                solved = difference(sums[:rounds], weights[:rounds])
                for i in range(everyone):
                    batch = data.batch(torch.tensor([own[i]]))
                    true = gl.FedSGD().mean(first, batch)
                    gap = sum(
                        float((solved.updates[i].values[k] - v).square().sum())
                        for k, v in true.values.items()
                    )
                    size = sum(float(v.square().sum()) for v in true.values.values())
                    errors.setdefault(rounds, []).append((gap / size) ** 0.5)
                    exact.setdefault(rounds, []).append(float(solved.exact[i]))
                    seen = Observation(
                        (Exchange(first, solved.updates[i]),),
                        gl.FedSGD(),
                        data.spec,
                        Knowledge(batch_size=1),
                    )
                    claim = LinearLayer()(seen, generator=stream).batch
                    mse = float((claim.inputs - batch.inputs).square().mean())
                    psnr.setdefault(rounds, []).append(
                        min(200.0, -10 * torch.tensor(max(mse, 1e-20)).log10().item())
                    )
                    labels.setdefault(rounds, []).append(float(idlg(seen) == batch.labels))
        rows += [
            {
                "setting": name,
                "rounds": r,
                **{
                    measure: mean(values[r], together=everyone)
                    for measure, values in (
                        ("solvable", exact), ("error", errors), ("psnr_db", psnr), ("label", labels)
                    )
                },  # fmt: skip
            }
            for r in errors
        ]
    return rows


def alone() -> list[dict[str, Any]]:
    """Of the coordinates that top-k sends, the share that one client alone wrote."""
    data = load("mnist-5k")
    owned = split(data, 0).clients
    state = gl.ModelState.of(build("lenet", data.spec, seed=1))
    rows = []
    for fraction in (0.01, 0.1):
        for n in (2, 4, 8, 16, 32, 64):
            shares = []
            for t in range(8):
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


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        measure(Path(sys.argv[2]), sys.argv[3:])
