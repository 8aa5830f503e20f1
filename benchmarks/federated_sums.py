"""What `gradleak train --aggregation` costs: time and bytes of a round, and the same model.

    python benchmarks/federated_sums.py --out federated_sums.json

Every protocol trains from the same seed in a process of its own, in this process's grid, in turn
with training without one. CPU seconds are those of server and clients together in one round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file


def played(settings: dict[str, Any]) -> dict[str, Any]:
    """One training: per round seconds of CPU, bytes and accuracy; and the weights it ends with."""
    import torch

    from gradleak.federate.settings import TrainSettings
    from gradleak.federate.training import train

    torch.set_num_threads(1)

    class Watching:
        seconds: list[float] = []  # noqa: RUF012

        def running(self, done: float, *, total: int, resumed: int) -> None:
            used = resource.getrusage(resource.RUSAGE_SELF)
            self.seconds.append(used.ru_utime + used.ru_stime)

    watching = Watching()
    with tempfile.TemporaryDirectory() as directory:
        record = train(TrainSettings(**settings), out=Path(directory), watcher=watching)
        weights = load_file(Path(directory) / "model.safetensors")
    rounds = record["rounds"]
    taken = [b - a for a, b in zip(watching.seconds, watching.seconds[1:], strict=False)]
    return {
        "aggregation": settings["aggregation"],
        "cpu_seconds": statistics.median(taken),
        "wall_seconds": statistics.median(r["seconds"] for r in rounds),
        "server_cpu_seconds": statistics.median(
            r["server_seconds"] + r.get("aggregation_seconds", 0.0) for r in rounds
        ),
        "bytes_up": rounds[-1]["bytes_up"],
        "bytes_down": rounds[-1]["bytes_down"],
        "steps": len(rounds[-1].get("steps", [0])),
        "failed": sum(len(r["failed"]) for r in rounds),
        "round_accuracy": [r["accuracy"] for r in rounds],
        "accuracy": record["accuracy"],
        "test_examples": record["test_examples"],
        "weights": {k: v.tolist() for k, v in weights.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist-5k")
    parser.add_argument("--model", default="lenet")
    parser.add_argument("--mechanism", default="fedsgd")
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--protocols", default="")
    parser.add_argument("--out", default=None)
    given = parser.parse_args()
    from gradleak.crypto import aggregations

    names = given.protocols.split(";") if given.protocols else list(aggregations())
    settings = {
        name: getattr(given, name)
        for name in ("data", "model", "mechanism", "learning_rate", "clients", "rounds")
    }
    found = []
    titles = ("CPU s", "server", "MB up", "MB down", "off by", "accuracy")
    print(f"{'aggregation':<14}" + "".join(f"{title:>10}" for title in titles))
    for name in ["none", *names]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            one = pool.submit(played, {**settings, "aggregation": name}).result()
        found.append(one)
        plain = found[0]["weights"]
        one["off_by"] = max(
            float(np.abs(np.array(v) - np.array(plain[k])).max()) for k, v in one["weights"].items()
        )
        print(
            f"{name:<14}{one['cpu_seconds']:>10.2f}{one['server_cpu_seconds']:>10.3f}"
            f"{one['bytes_up'] / 1e6:>10.2f}{one['bytes_down'] / 1e6:>10.2f}"
            f"{one['off_by']:>10.1e}{one['accuracy']:>10.2%}",
            flush=True,
        )
    for one in found:
        del one["weights"]
    if given.out:
        content = {"settings": dataclasses.asdict(_settings(settings)), "found": found}
        Path(given.out).write_text(json.dumps(content, indent=1) + "\n")


def _settings(given: dict[str, Any]) -> Any:
    from gradleak.federate.settings import TrainSettings

    return TrainSettings(**given)


if __name__ == "__main__":
    main()
