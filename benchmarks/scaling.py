"""Cost of one step of Inverting Gradients against parameters, batch, image size and local steps.

One thing is varied at a time, from convnet on one 32×32 image and FedSGD. A step is one value and
gradient of the whole objective for every trial, on the engine that an attack would choose; targets
are random images, which cost what photographs cost. Subjects take turns within every round.

    python benchmarks/scaling.py --out scaling.json
    python benchmarks/scaling.py --axes batch,side --trials 32
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import networks
import torch

from gradleak.attacks.parts.objective import calibrated
from gradleak.attacks.recipes.inverting_gradients import InvertingGradients
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.observation import observe
from gradleak.types import Batch, DataSpec, Mechanism, ModelState

LOCAL_LEARNING_RATE = 0.05


@dataclass(frozen=True)
class Setting:
    """What one client does; `local_steps` 0 is FedSGD."""

    network: str = "convnet"
    batch: int = 1
    side: int = 32
    local_steps: int = 0


BASE = Setting()
AXES: dict[str, list[Setting]] = {
    "parameters": [replace(BASE, network=n) for n in ("convnet", "convnet-x2", "convnet-x4")],
    "batch": [replace(BASE, batch=b) for b in (1, 2, 4, 8, 16)],
    "side": [replace(BASE, side=s) for s in (16, 32, 64)],
    "local steps": [replace(BASE, local_steps=s) for s in (0, 1, 2, 4)],
}


@dataclass(frozen=True)
class Subject:
    """A step ready to be timed."""

    step: Callable[[], object]
    parameters: int
    engine: str


def subject(setting: Setting, *, trials: int) -> Subject:
    """One value and gradient of the objective, for trials with targets of their own."""
    spec = DataSpec.image((3, setting.side, setting.side), 10)
    state = ModelState.of(networks.build(setting.network, spec, seed=0).eval())
    mechanism: Mechanism = FedSGD()
    if setting.local_steps:
        mechanism = FedAvg(learning_rate=LOCAL_LEARNING_RATE, steps=setting.local_steps)
    stream = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(trials):
        inputs = torch.rand((setting.batch, *spec.shape), generator=stream)
        labels = torch.randint(spec.classes, (setting.batch,), generator=stream)
        update = mechanism.mean(state, Batch(inputs, labels))
        seen.append(
            observe(
                state,
                update=update.values,
                data=spec,
                batch_size=setting.batch,
                kind=update.kind,
                mechanism=mechanism,
                labels=labels,
            )
        )
    objective = replace(InvertingGradients().compose(seen), targets=tuple(range(trials)))
    variables = objective.unknown.start(stream, restarts=trials)
    objective = replace(objective, engine=calibrated(objective, variables))
    order = list(range(trials))
    return Subject(
        step=lambda: objective.value_and_gradient(variables, order),
        parameters=objective.fit.parameters,
        engine=objective.engine,
    )


def measure(
    settings: list[Setting], *, trials: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Median CPU milliseconds per step and trial of every setting, with the range over rounds."""
    subjects = [subject(setting, trials=trials) for setting in settings]
    repeats = []
    for one in subjects:
        before = time.process_time()
        one.step()
        repeats.append(max(1, round(seconds / max(1e-6, time.process_time() - before))))
    spent: list[list[float]] = [[] for _ in subjects]
    for _ in range(rounds):
        for one, times, taken in zip(subjects, repeats, spent, strict=True):
            before = time.process_time()
            for _ in range(times):
                one.step()
            taken.append(1e3 * (time.process_time() - before) / times / trials)
    return [
        {
            "network": setting.network,
            "batch": setting.batch,
            "side": setting.side,
            "local_steps": setting.local_steps,
            "parameters": one.parameters,
            "engine": one.engine,
            "trials": trials,
            "step_ms": statistics.median(taken),
            "range_ms": [min(taken), max(taken)],
        }
        for setting, one, taken in zip(settings, subjects, spent, strict=True)
    ]


def main() -> None:
    """Parse the command line, measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--axes", default=",".join(AXES), help="which to vary")
    parser.add_argument("--trials", type=int, default=8, help="at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU per subject and round")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"torch": torch.__version__}
    print("| axis | network | parameters | batch | side | local steps | engine ", end="")
    print("| ms per step and trial (range) | of the first |")
    print("|---|---|---|---|---|---|---|---|---|")
    for axis in given.axes.split(","):
        if axis not in AXES:
            raise SystemExit(f"axis {axis!r}: expected some of {', '.join(AXES)}")
        rows = measure(AXES[axis], trials=given.trials, rounds=given.rounds, seconds=given.seconds)
        record[axis] = rows
        for row in rows:
            low, high = row["range_ms"]
            first = row["step_ms"] / rows[0]["step_ms"]
            print(
                f"| {axis} | {row['network']} | {row['parameters']} | {row['batch']} "
                f"| {row['side']} | {row['local_steps'] or 'FedSGD'} | {row['engine']} "
                f"| {row['step_ms']:.2f} ({low:.2f}–{high:.2f}) | {first:.2f} |",
                flush=True,
            )
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
