"""Cost of one inner step, in units of the floor.

The floor is what no plain double backward can avoid, for one trial: a forward pass, the gradient in
the parameters with its graph, and one backward pass to the input. Each engine is charged for
everything its step does, penalties aside: value and gradient of the cosine distance to the updates
of its own targets.

    python benchmarks/floor.py --out floor.json
    python benchmarks/floor.py --cases lenet:1,8 --batch 4

Subjects take turns within every round; the table holds medians of CPU seconds over rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from gradleak import models
from gradleak.attacks.parts.distances import cosine
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Engine, Objective
from gradleak.attacks.parts.unknowns import Images
from gradleak.mechanisms import FedSGD
from gradleak.observation import observe
from gradleak.types import Batch, DataSpec, ModelState

SPEC = DataSpec.image((3, 32, 32), 10)
CASES = "lenet:1,8,128;convnet:1,32;resnet18:1,4"
Step = Callable[[], object]


def floor_step(model: torch.nn.Module, batch: Batch) -> Step:
    """Forward, gradient with graph, one backward to the input."""
    parameters = list(model.parameters())
    target = [torch.randn_like(p) for p in parameters]
    inputs = batch.inputs.clone().requires_grad_()

    def step() -> object:
        loss = cross_entropy(model(inputs), batch.labels)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.autograd.grad(gradient, inputs, grad_outputs=target)

    return step


def engine_step(state: ModelState, *, trials: int, size: int, engine: Engine) -> Step | None:
    """One value and gradient of all trials, each with a target of its own; None if unsupported."""
    seen = []
    for i in range(trials):
        batch = random_batch(size, seed=i)
        update = FedSGD().mean(state, batch).values
        seen.append(observe(state, update=update, data=SPEC, batch_size=size, labels=batch.labels))
    labels = torch.stack([o.knowledge.labels for o in seen if o.knowledge.labels is not None])
    unknown = Images(SPEC, size, labels, boxed=True, mean=0.5, std=0.25, dtype=torch.float32)
    objective = Objective(
        unknown,
        Matching(seen, cosine, dtype=torch.float32),
        targets=tuple(range(trials)),
        engine=engine,
    )
    if engine == "fast" and objective.fit.fast is None:
        return None
    variables = unknown.start(torch.Generator().manual_seed(0), restarts=trials)
    order = list(range(trials))
    return lambda: objective.value_and_gradient(variables, order)


def random_batch(size: int, *, seed: int) -> Batch:
    """Random images and labels."""
    stream = torch.Generator().manual_seed(seed)
    inputs = torch.rand((size, *SPEC.shape), generator=stream)
    return Batch(inputs, torch.randint(SPEC.classes, (size,), generator=stream))


def measure(
    subjects: dict[str, tuple[Step, int]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """CPU seconds per trial of every subject and round; (step, trials in it) by name."""
    repeats = {}
    for name, (step, _) in subjects.items():
        step()
        before = time.process_time()
        step()
        repeats[name] = max(1, round(seconds / max(1e-6, time.process_time() - before)))
    spent: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, (step, trials) in subjects.items():
            before = time.process_time()
            for _ in range(repeats[name]):
                step()
            spent[name].append((time.process_time() - before) / repeats[name] / trials)
    return spent


def run_case(
    name: str, trials: list[int], *, size: int, engines: list[Engine], rounds: int, seconds: float
) -> list[dict[str, object]]:
    """Rows of the table for one network."""
    model = models.build(name, SPEC, seed=0).eval()
    state = ModelState.of(model)
    rows = []
    for count in trials:
        subjects: dict[str, tuple[Step, int]] = {
            "floor": (floor_step(model, random_batch(size, seed=0)), 1)
        }
        for engine in engines:
            if engine == "vmap" and count == 1:
                continue
            looped = min(count, 2) if engine == "loop" else count
            step = engine_step(state, trials=looped, size=size, engine=engine)
            if step is not None:
                subjects[engine] = (step, looped)
        spent = measure(subjects, rounds=rounds, seconds=seconds)
        floor = statistics.median(spent["floor"])
        for engine in subjects:
            if engine == "floor":
                continue
            ratios = [s / f for s, f in zip(spent[engine], spent["floor"], strict=True)]
            row = {
                "network": name,
                "batch": size,
                "trials": count,
                "engine": engine,
                "floor_ms": 1e3 * floor,
                "step_ms": 1e3 * statistics.median(spent[engine]),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
            rows.append(row)
            print(
                f"{name:10} {size:5} {count:6} {engine:6} {row['floor_ms']:9.3f} "
                f"{row['step_ms']:9.3f} {row['ratio']:6.2f}  "
                f"{row['lowest']:.2f}–{row['highest']:.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", default=CASES, help="network:trials,trials;...")
    parser.add_argument("--batch", type=int, default=1, help="images per trial")
    parser.add_argument("--engines", default="loop,vmap,fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU per subject and round")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("network    batch trials engine  floor ms   step ms  ratio  range (per trial)")
    rows = []
    for case in given.cases.split(";"):
        name, counts = case.split(":")
        rows += run_case(
            name,
            [int(c) for c in counts.split(",")],
            size=given.batch,
            engines=given.engines.split(","),
            rounds=given.rounds,
            seconds=given.seconds,
        )
    if given.out:
        record = {"torch": torch.__version__, "machine": platform.machine(), "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
