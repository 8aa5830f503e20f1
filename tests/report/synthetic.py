"""Result directories of known content: real digits, worsened to the degree a test asks for.

The records go through `findings` and the store's file formats, so a report made from them is the
report that an audit with these reconstructions would have written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_digits
from torch import Tensor

from gradleak import jsonsafe
from gradleak.metrics import baselines, score
from gradleak.report.findings import findings, headline
from gradleak.types import Batch, DataSpec

BANK = 100


@dataclass(frozen=True)
class Case:
    """One finding to fake.

    Attributes:
        sigma: blur of the reconstructions in pixels, varied over targets; inf gives noise.
        optimiser_limited: whether the faked objective prefers the truth.
        statuses: status of the first targets, where not "exhausted".
    """

    defense: str
    attack: str
    sigma: float
    stage: str = "init"
    batch_size: int = 1
    state: str = "measured"
    reason: str | None = None
    optimiser_limited: bool = False
    adaptive: bool = True
    statuses: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 3.1
    threat: Mapping[str, Any] = field(
        default_factory=lambda: {
            "server": "honest",
            "view": "client",
            "knows": ["batch_size", "mechanism"],
        }
    )


def digits(*, channels: int = 1) -> Batch:
    """scikit-learn's digits in [0, 1]; three channels give each class a colour."""
    bunch = load_digits()
    grey = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    if channels == 3:
        colours = torch.rand(10, 3, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.2
        grey = grey * colours[labels][:, :, None, None]
    return Batch(grey, labels)


def worsened(truth: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Blur images (b, C, H, W) with a little noise; an infinite sigma leaves only noise."""
    noise = torch.rand(truth.shape, generator=generator)
    if math.isinf(sigma):
        return noise
    blurred = torch.as_tensor(gaussian_filter(truth.numpy(), (0, 0, sigma, sigma)))
    return (blurred + 0.02 * sigma * (noise - 0.5)).clamp(0, 1)


def record(case: Case, pool: Batch, directory: Path, *, targets: int, model: str) -> dict[str, Any]:
    """Fake one line of trials.jsonl and its tensors."""
    b = case.batch_size
    scenario = {
        "data": "digits",
        "model": model,
        "stage": case.stage,
        "mechanism": "fedsgd",
        "batch_size": b,
    }
    name = f"digits/{model}/{case.stage}/fedsgd-b{b}/{case.defense}/{case.attack}"
    name += "" if case.adaptive else " (unaware)"
    line: dict[str, Any] = {
        "schema_version": 1,
        "key": name,
        "finding": name,
        "state": case.state,
        "reason": case.reason,
        "scenario": scenario,
        "threat": dict(case.threat),
        "attack": case.attack,
        "attack_spec": f"{case.attack}:restarts=2,steps=300",
        "defense": case.defense.partition(":")[0],
        "defense_spec": case.defense,
        "adaptive": case.adaptive,
        "seed": 0,
        "group": 0,
        "seconds": case.seconds,
        "gradient_evaluations": 4800,
        "engine": "vmap",
        "warnings": list(case.warnings),
        "bank_size": BANK,
        "targets": [],
    }
    if case.state != "measured":
        return line
    spec = DataSpec.image(tuple(pool.inputs.shape[1:]), 10)  # type: ignore[arg-type]
    bank = pool.inputs[:BANK]
    public = Batch(pool.inputs[1000:], pool.labels[1000:])
    generator = torch.Generator().manual_seed(len(name))
    kept: dict[str, list[Tensor]] = {"truth": [], "claim": [], "control": [], "baseline": []}
    for client in range(targets):
        own = slice(client * b, client * b + b)
        truth = Batch(pool.inputs[own], pool.labels[own])
        status = case.statuses[client] if client < len(case.statuses) else "exhausted"
        claim = worsened(truth.inputs, case.sigma * (0.4 + 1.2 * client / targets), generator)
        if status == "diverged":
            claim = torch.full_like(claim, math.nan)
        other = slice(200 + client * b, 200 + client * b + b)
        control = worsened(pool.inputs[other], min(case.sigma, 2.0), generator)
        guesses = baselines(public, truth, labels_known=False, spec=spec)
        line["targets"].append(
            {
                "client": client,
                "status": status,
                "message": "non-finite objective at step 12" if status == "diverged" else "",
                "objective": 0.5 if case.optimiser_limited else 1e-12,
                "objective_at_truth": 0.0,
                "scores": score(Batch(claim, truth.labels), truth, bank=bank, spec=spec),
                "control": score(Batch(control, pool.labels[other]), truth, bank=bank, spec=spec),
                "baselines": {k: score(v, truth, bank=bank, spec=spec) for k, v in guesses.items()},
            }
        )
        kept["truth"].append(truth.inputs)
        kept["claim"].append(claim.flip(0))
        kept["control"].append(control)
        kept["baseline"].append(guesses["mean_image"].inputs)
    line["tensors"] = f"tensors/{len(list((directory / 'tensors').iterdir())):04d}.safetensors"
    save_file({k: torch.stack(v) for k, v in kept.items()}, directory / line["tensors"])
    return line


def result_of(found: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """Wrap findings as the content of result.json."""
    return {
        "schema_version": 1,
        "gradleak_version": "0.1.0",
        "settings": {
            "given": {"data": "digits", "defense": ["none", "clip:norm=1"]},
            "defaulted": {"seed": 0, "budget": "quick", "weights": None, "quiet": False},
        },
        "environment": {"python": "3.11.9", "torch": "2.13.0", "processor": "x86_64, 2 cores"},
        "seconds": 61.2,
        "findings": list(found),
        "headline": headline(list(map(dict, found))),
        "not_tested": [
            "Malicious servers, which alter the model that they broadcast",
            "Secure aggregation",
        ],
        "command": "gradleak audit --data digits --defense none --defense clip:norm=1 --seed 0",
        "fail_on": [],
    } | changes


def trained(
    place: Path,
    defense: str,
    accuracy: float | None,
    *,
    seconds: float = 2.0,
    bytes_up: int = 1_000_000,
    status: str = "done",
    **settings: Any,
) -> str:
    """What `gradleak train` leaves in a directory."""
    place.mkdir(parents=True)
    chosen = {"data": "digits", "model": "lenet-tiny", "clients": 10, "rounds": 20, "seed": 0}
    rounds = [
        {"round": n, "accuracy": accuracy, "seconds": seconds, "bytes_up": bytes_up}
        for n in range(1, 3)
    ]
    content = {
        "schema_version": 1,
        "settings": chosen | {"defense": defense} | settings,
        "rounds": rounds,
        "accuracy": accuracy,
        "test_examples": 500,
        "status": status,
        "reason": "a client sent nan" if status == "stopped" else None,
    }
    (place / "training.json").write_text(jsonsafe.dumps(content))
    return str(place)


def write(
    directory: Path,
    cases: Sequence[Case],
    *,
    channels: int = 1,
    targets: int = 8,
    pool: Batch | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Fill `directory` with result.json and tensors; returns the result."""
    (directory / "tensors").mkdir(parents=True)
    pool = pool or digits(channels=channels)
    records = [record(c, pool, directory, targets=targets, model="lenet-tiny") for c in cases]
    result = result_of(findings(records), **changes)
    (directory / "result.json").write_text(jsonsafe.dumps(result, indent=1), encoding="utf-8")
    return result


TYPICAL = (
    Case("none", "dlg", 0.12),
    Case("none", "inverting-gradients", 0.35),
    Case("gaussian-noise:std=0.01", "dlg", 1.6, optimiser_limited=True),
    Case(
        "gaussian-noise:std=0.01",
        "inverting-gradients",
        1.2,
        optimiser_limited=True,
        statuses=("diverged", "failed"),
        warnings=("the objective at the truth is 0.31, above the noise level 0.10",),
    ),
    Case("gaussian-noise:std=1", "dlg", math.inf),
    Case("gaussian-noise:std=1", "inverting-gradients", math.inf, adaptive=False),
    Case("clip:norm=1", "dlg", 0.2),
    Case("clip:norm=1", "inverting-gradients", 0.3, statuses=("diverged",)),
    Case("top-k:fraction=0.1", "dlg", 0.6),
    Case(
        "top-k:fraction=0.1",
        "linear-layer",
        0.0,
        state="not_applicable",
        reason="the first layer is a convolution: the closed form needs a linear one",
    ),
    Case("precode", "dlg", 0.0, state="error", reason="out of memory: 9.1 GiB were asked for"),
)
"""A quick audit: leaking, inconclusive and protected, with a failure and a case out of scope."""

MANY = tuple(
    Case(defense, attack, sigma, stage=stage, batch_size=b)
    for stage, worse in (("init", 0.0), ("early", 0.3), ("trained", 0.8))
    for b in (1, 4)
    for defense, sigma in (
        ("none", 0.1),
        ("gaussian-noise:std=0.01", 0.7),
        ("laplace-noise:std=0.01", math.inf),
        ("clip:norm=1", 0.2),
    )
    for attack, sigma in (("dlg", sigma + worse), ("inverting-gradients", 1.3 * sigma + worse))
)
"""A broad audit: 48 findings over three stages and two batch sizes."""
