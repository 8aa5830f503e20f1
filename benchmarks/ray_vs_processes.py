"""The same audit in worker processes and on a local Ray cluster of as many one-processor nodes.

    .venv/bin/python benchmarks/ray_vs_processes.py --out runs/ray --rounds 3

Processes and Ray take turns. Seconds are those from the first word of a trial to the last; starting
Ray, loading data and writing the report are not in them. CPU seconds are those that this process
and everything it started spent meanwhile. Efficiency is the median over rounds of processes' figure
over Ray's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# 15 by default: a busy machine would starve Ray alone
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)

from ray.cluster_utils import Cluster

from gradleak.auditing import ENGINES, run_audit
from gradleak.run.settings import AuditSettings

DEFENSES = ["none", "gaussian-noise:std=0.01", "top-k:fraction=0.3", "clip:norm=1"]


class Clock:
    """Notes when trials begin and end."""

    def __init__(self) -> None:
        self.said: list[float] = []
        self.spent: list[float] = []

    def planned(self, plan: str) -> None:
        """Not a trial."""

    def preparing(self, what: str) -> None:
        """Not a trial."""

    def running(self, done: float, *, total: int, resumed: int) -> None:
        """Take the time."""
        self.said.append(time.monotonic())
        if len(self.said) == 2 or done == total:  # workers are alive: Ray buries them uncounted
            self.spent.append(cpu_seconds())

    @property
    def seconds(self) -> float:
        """From the first trial under way to the last one done."""
        return self.said[-1] - self.said[1]


def cpu_seconds() -> float:
    """CPU time of this process and its living and buried descendants."""
    spent: dict[int, tuple[int, float]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            spent[int(entry.name)] = int(fields[1]), sum(map(float, fields[11:15]))
    total, family = 0.0, {os.getpid()}
    while family:
        total += sum(spent[pid][1] for pid in family)
        family = {pid for pid, (parent, _) in spent.items() if parent in family}
    return total / os.sysconf("SC_CLK_TCK")


def audit(
    out: Path, engines: Path, *, steps: int, targets: int, **where: object
) -> dict[str, object]:
    """Run the audit; its seconds, CPU seconds and findings."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if engines.exists():
        shutil.copy(engines, out / ENGINES)
    asked = {
        "data": "digits",
        "model": "lenet-tiny",
        "attack": f"dlg:steps={steps},restarts=1",
        "defense": DEFENSES,
        "targets": targets,
        "out": str(out),
    }
    clock = Clock()
    report = run_audit(AuditSettings.of(asked | where), watcher=clock)
    shutil.copy(out / ENGINES, engines)
    findings = report.findings
    for finding in findings:
        del finding["cost"]["seconds"]
    return {
        "seconds": clock.seconds,
        "cpu_seconds": clock.spent[-1] - clock.spent[0],
        "findings": json.dumps(findings),
        "failed": len(report.failed),
    }


def on_ray(nodes: int, run: Callable[..., dict[str, object]]) -> dict[str, object]:
    """Run on a fresh cluster: a head without processors, and `nodes` nodes of one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        return run(ray=cluster.address)
    finally:
        cluster.shutdown()


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--targets", type=int, default=50, help="trials are four times as many")
    args = parser.parse_args()
    engines = args.out / ENGINES

    def run(name: str = "processes", **where: object) -> dict[str, object]:
        return audit(args.out / name, engines, steps=args.steps, targets=args.targets, **where)

    run(workers=args.nodes)  # measures the engines, and warms the file cache
    found: dict[str, list[dict[str, object]]] = {"processes": [], "ray": []}
    for _ in range(args.rounds):
        found["processes"].append(run(workers=args.nodes))
        found["ray"].append(on_ray(args.nodes, lambda **where: run("ray", **where)))
        for name, rounds in found.items():
            last = rounds[-1]
            print(
                f"{name:10} {last['seconds']:7.1f} s {last['cpu_seconds']:7.1f} CPU s "
                f"{last['failed']} failed",
                flush=True,
            )
    print("equal findings:", len({r["findings"] for rounds in found.values() for r in rounds}) == 1)
    for figure in ("seconds", "cpu_seconds"):
        ratios = [
            float(str(p[figure])) / float(str(r[figure]))
            for p, r in zip(found["processes"], found["ray"], strict=True)
        ]
        print(
            f"efficiency in {figure}: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
