"""Resident peak of one inner step, each case in a fresh process, beside gradleak's estimate.

    python benchmarks/memory.py                                  # networks x mechanisms
    python benchmarks/memory.py --cases "convnet:4,32" --plain   # unrolled without segments
    python benchmarks/memory.py --audit --attack dlg:steps=3     # a worker of an audit (CIFAR-10)

A case is a network and numbers of local steps (0 is FedSGD). `before` is the resident set of the
process when all is ready to step, `peak` its highest resident set after three steps, `above` their
difference; `estimate` is what a dry run of the step predicts for `above`. With `--audit` a case is
an audit of one worker: `peak` is that worker's, `estimate` what the plan says.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gradleak import models
from gradleak.attacks.parts import memory
from gradleak.attacks.parts.distances import cosine
from gradleak.attacks.parts.matching import Matching
from gradleak.attacks.parts.objective import Engine, Objective
from gradleak.attacks.parts.unknowns import Images
from gradleak.auditing import Unwatched, run_audit
from gradleak.mechanisms import FedAvg, FedSGD, unroll
from gradleak.observation import observe
from gradleak.run.settings import AuditSettings
from gradleak.types import Batch, DataSpec, Mechanism, ModelState

SPEC = DataSpec.image((3, 32, 32), 10)
CASES = "lenet:0,4,32;convnet:0,4,32;resnet18:0,4"
MIB = 2**20


def prepare(model: str, *, steps: int, size: int, trials: int, engine: Engine) -> Objective:
    """An objective over `trials` targets of `size` random images."""
    state = ModelState.of(models.build(model, SPEC, seed=0))
    mechanism: Mechanism = FedAvg(steps=steps) if steps else FedSGD()
    stream = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(trials):
        inputs = torch.rand((size, *SPEC.shape), generator=stream)
        batch = Batch(inputs, torch.randint(SPEC.classes, (size,), generator=stream))
        update = mechanism.mean(state, batch)
        seen.append(
            observe(
                state,
                update=update.values,
                kind=update.kind,
                data=SPEC,
                mechanism=mechanism,
                batch_size=size,
                labels=batch.labels,
            )
        )
    unknown = Images(SPEC, size, None, boxed=True, mean=0.5, std=0.25, dtype=torch.float32)
    fit = Matching(seen, cosine, dtype=torch.float32)
    return Objective(unknown, fit, targets=tuple(range(trials)), engine=engine)


def resident(field: str) -> int:
    """A field of this process's memory status, e.g. VmRSS, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measure_here(args: argparse.Namespace) -> None:
    """Print before, peak and estimate of one case, in bytes."""
    torch.set_num_threads(1)
    if args.plain:
        unroll.PLAIN_STEPS = 10**6
    objective = prepare(
        args.model, steps=args.steps, size=args.batch, trials=args.trials, engine=args.engine
    )
    start = objective.unknown.start(torch.Generator().manual_seed(0), restarts=args.trials)
    fit = objective.fit
    estimate = args.trials * memory.of_step(fit.mechanism, fit.state, SPEC, batch_size=args.batch)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(3):
        objective.value_and_gradient(start, list(range(args.trials)))
    print(before, resident("VmHWM"), estimate)


class Listener(Unwatched):
    """Remembers the plan."""

    def planned(self, plan: str) -> None:
        """Take the bytes that the plan names."""
        self.foretold = float(plan.split("about ")[1].split(" GB")[0]) * 1e9


def audit_here(args: argparse.Namespace) -> None:
    """Print 0, a worker's peak and the plan's estimate, in bytes."""
    with tempfile.TemporaryDirectory() as out:
        asked = {
            "data": "cifar10",
            "model": args.model,
            "mechanism": "fedavg" if args.steps else "fedsgd",
            "batch_size": args.batch,
            "attack": args.attack,
            "targets": args.trials,
            "defense": "none",
            "workers": 1,
            "out": out,
        }
        listener = Listener()
        fedavg = {"local_steps": args.steps} if args.steps else {}
        run_audit(AuditSettings.of(asked | fedavg), watcher=listener)
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(0, peak, int(listener.foretold))


def main() -> None:
    """Measure every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--engine", default="loop", choices=("loop", "vmap", "fast"))
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--attack", default="inverting-gradients:steps=3")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model:
        (audit_here if args.audit else measure_here)(args)
        return
    print(f"batch {args.batch}, {args.trials} trials, engine {args.engine}; MiB")
    print(f"{'case':16} {'before':>8} {'peak':>8} {'above':>8} {'estimate':>9} {'ratio':>6}")
    for case in args.cases.split(";"):
        model, _, steps = case.partition(":")
        for count in steps.split(","):
            command = [*sys.argv, "--model", model, "--steps", count]
            done = subprocess.run(
                [sys.executable, *command], check=True, capture_output=True, text=True
            )
            before, peak, estimate = (int(n) / MIB for n in done.stdout.split())
            print(
                f"{model + ' K=' + count:16} {before:8.0f} {peak:8.0f} {peak - before:8.1f} "
                f"{estimate:9.1f} {estimate / (peak - before):6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
