"""Cost of one inner step, in units of the floor: CPU time, and peak resident memory.

The floor is what no plain double backward can avoid, for one trial: a forward pass, the gradient in
the parameters with its graph, and one backward pass to the input. Each engine is charged for
everything its step does, penalties aside: value and gradient of the cosine distance to the updates
of its own targets.

    python benchmarks/floor.py --out floor.json
    python benchmarks/floor.py --cases lenet:1,8 --batch 1,4,16
    python benchmarks/floor.py --memory --cases resnet18:1 --batch 4
    python benchmarks/floor.py --check benchmarks/last.json

Subjects take turns within every round; the table holds medians of CPU seconds over rounds. Memory
is the high-water mark of a process of its own per subject: "memory" during steps, "setup" before
the first, client and probe of the closed forms included (Linux).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import vit
from torch.nn.attention import SDPBackend, sdpa_kernel
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
CASES = "lenet:1,8,128;convnet:1,32;vit:1,32;resnet18:1,4"
Step = Callable[[], object]
Row = dict[str, Any]


def network(name: str) -> torch.nn.Module:
    """One of the library's networks, or the transformer beside this file."""
    if name != "vit":
        return models.build(name, SPEC, seed=0).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vit.small(SPEC).eval()


def floor_step(model: torch.nn.Module, batch: Batch) -> Step:
    """Forward, gradient with graph, one backward to the input."""
    parameters = list(model.parameters())
    target = [torch.randn_like(p) for p in parameters]
    inputs = batch.inputs.clone().requires_grad_()

    def step() -> object:
        # Fused attention kernels cannot be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
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


def subject(name: str, engine: str, *, trials: int, size: int) -> tuple[Step, int] | None:
    """A step and the trials in it; None where the engine does not cover the network."""
    model = network(name)
    if engine == "floor":
        return floor_step(model, random_batch(size, seed=0)), 1
    if engine == "vmap" and trials == 1:
        return None
    count = min(trials, 2) if engine == "loop" else trials
    step = engine_step(ModelState.of(model), trials=count, size=size, engine=engine)  # type: ignore[arg-type]
    return None if step is None else (step, count)


def run_case(
    name: str, trials: int, *, size: int, engines: Sequence[str], rounds: int, seconds: float
) -> list[Row]:
    """Rows of the table for one network, number of trials and batch size."""
    subjects = {}
    for engine in ("floor", *engines):
        found = subject(name, engine, trials=trials, size=size)
        if found is not None:
            subjects[engine] = found
    spent = measure(subjects, rounds=rounds, seconds=seconds)
    rows: list[Row] = []
    for engine in subjects:
        if engine == "floor":
            continue
        ratios = [s / f for s, f in zip(spent[engine], spent["floor"], strict=True)]
        row = {
            "network": name,
            "batch": size,
            "trials": trials,
            "engine": engine,
            "quantity": "cpu",
            "floor": 1e3 * statistics.median(spent["floor"]),
            "step": 1e3 * statistics.median(spent[engine]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
        rows.append(row)
        show(row)
    return rows


def run_memory(name: str, trials: int, *, size: int, engines: Sequence[str]) -> list[Row]:
    """Peak resident memory of whole processes, the floor's as the unit."""
    floor = peaks(name, "floor", trials=1, size=size)
    rows: list[Row] = []
    for engine in engines:
        own = peaks(name, engine, trials=trials, size=size)
        if own is None or floor is None:
            continue
        for quantity in ("memory", "setup"):
            ratio = own[quantity] / floor["memory"]
            row = {
                "network": name,
                "batch": size,
                "trials": trials,
                "engine": engine,
                "quantity": quantity,
                "floor": floor["memory"],
                "step": own[quantity],
                "ratio": ratio,
                "lowest": ratio,
                "highest": ratio,
            }
            rows.append(row)
            show(row)
    return rows


def peaks(name: str, engine: str, *, trials: int, size: int) -> dict[str, float] | None:
    """High-water marks in MiB of a fresh process: up to the first step, and of three steps."""
    command = [sys.executable, __file__, "--cases", f"{name}:{trials}", "--batch", str(size)]
    done = subprocess.run(
        [*command, "--peaks-of", engine], capture_output=True, text=True, check=True
    )
    found: dict[str, float] | None = json.loads(done.stdout.splitlines()[-1])
    return found


def own_peaks(name: str, engine: str, *, trials: int, size: int) -> dict[str, float] | None:
    """What `peaks` asks of its process."""
    found = subject(name, engine, trials=trials, size=size)
    if found is None:
        return None
    setup = high_water()
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    for _ in range(3):
        found[0]()
    return {"setup": setup, "memory": high_water()}


def high_water() -> float:
    """Peak resident memory of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def show(row: Row) -> None:
    print(
        f"{row['network']:10} {row['batch']:5} {row['trials']:6} {row['engine']:6} "
        f"{row['quantity']:6} {row['floor']:9.3f} {row['step']:9.3f} {row['ratio']:6.2f}  "
        f"{row['lowest']:.2f}–{row['highest']:.2f}",
        flush=True,
    )


def compare(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """One line per ratio whose whole range lies above the earlier range."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[k] for k in ("network", "batch", "trials", "engine", "quantity"))

    known = {key(row): row for row in before}
    lines = []
    for row in now:
        old = known.get(key(row))
        slack = 0.05 * row["ratio"] if row["quantity"] != "cpu" else 0.0
        if old is not None and row["lowest"] - slack > old["highest"]:
            what = " ".join(str(part) for part in key(row))
            lines.append(f"worse: {what}: {old['ratio']:.2f} -> {row['ratio']:.2f}")
    return lines


def cases(text: str, batches: str) -> list[tuple[str, int, int]]:
    """(network, trials, batch size) of every case asked for."""
    found = []
    for case in text.split(";"):
        name, counts = case.split(":")
        sizes = [int(b) for b in batches.split(",")]
        found += [(name, int(c), size) for size in sizes for c in counts.split(",")]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", default=CASES, help="network:trials,trials;...")
    parser.add_argument("--batch", default="1", help="images per trial: one or several numbers")
    parser.add_argument("--engines", default="loop,vmap,fast")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU per subject and round")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of CPU time")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON; keeps other rows")
    parser.add_argument("--check", type=Path, help="say which ratios are worse than in this file")
    parser.add_argument("--machine", default=platform.machine(), help="a word for the machine")
    parser.add_argument("--peaks-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted = cases(given.cases, given.batch)
    if given.peaks_of:
        name, count, size = wanted[0]
        print(json.dumps(own_peaks(name, given.peaks_of, trials=count, size=size)))
        return 0
    print("network    batch trials engine what   floor       step     ratio  range (per trial)")
    rows: list[Row] = []
    for name, count, size in wanted:
        engines = given.engines.split(",")
        if given.memory:
            rows += run_memory(name, count, size=size, engines=engines)
        else:
            rows += run_case(
                name,
                count,
                size=size,
                engines=engines,
                rounds=given.rounds,
                seconds=given.seconds,
            )
    worse = compare(json.loads(given.check.read_text())["rows"], rows) if given.check else []
    print("\n".join(worse) if worse else "no ratio got worse" if given.check else "")
    if given.out:
        write(given.out, rows, machine=given.machine)
    return 1 if worse else 0


def write(path: Path, rows: Sequence[Row], *, machine: str) -> None:
    """Put these rows into a file of figures, in the place of rows of the same cases."""
    kept: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    labels = ("network", "batch", "trials", "engine", "quantity")
    new = {tuple(r[k] for k in labels) for r in rows}
    record = {
        "torch": torch.__version__,
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "units": {"cpu": "ms per trial", "memory, setup": "MiB"},
        "rows": [*[r for r in kept if tuple(r[k] for k in labels) not in new], *rows],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
