"""Measure and draw docs/assets/federated-training.svg: accuracy per round under protections.

    python docs/assets/federated_training.py measure DIR
    python docs/assets/federated_training.py draw DIR

A training that was stopped goes on; one that is done is left alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from gradleak.federate.settings import TrainSettings
from gradleak.federate.training import train

COMMON = TrainSettings(data="digits", model="mlp", rounds=60, learning_rate=0.5)
LINES = {
    "none": ("none", COMMON, "#8a94a3"),
    "gossip": ("none, gossip over a ring", replace(COMMON, topology="gossip"), "#2b5fa8"),
    "top-k": ("top-k, 1 %", replace(COMMON, defense="top-k:fraction=0.01"), "#d98b1f"),
    "noise": (
        "noise 0.05",
        replace(COMMON, defense="gaussian-noise:std=0.05"),
        "#3f8f5a",
    ),
    "more-noise": (
        "noise 0.2",
        replace(COMMON, defense="gaussian-noise:std=0.2"),
        "#b0413e",
    ),
}


def draw(directory: Path) -> None:
    """Draw accuracy on the test examples of every round, a mean over 10 rounds."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for name, (label, _, colour) in LINES.items():
        found = json.loads((directory / name / "training.json").read_text())
        accuracy = torch.tensor([r["accuracy"] for r in found["rounds"]])
        smooth = accuracy.unfold(0, 10, 1).mean(1)
        label = f"{label}: {found['accuracy']:.1%} in the end"
        axes.plot(range(10, 10 + len(smooth)), smooth, color=colour, label=label)
    axes.set(xlabel="round", ylabel="accuracy on public examples", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("federated-training.svg"), metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, where = sys.argv[1], Path(sys.argv[2])
    if task == "measure":
        for name, (_, settings, _) in LINES.items():
            train(settings, out=where / name)
            print(name, "done", flush=True)
    else:
        draw(where)
