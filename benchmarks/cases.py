"""A case on disk, as two environments read it: a network, targets, gradients, claims and costs.

    case.json                  what it is, and which examples the targets are
    state.safetensors          weights and buffers
    truth.safetensors          images (targets, b, *shape) and labels (targets, b)
    gradient-NN.safetensors    what a client with target NN sends, float32
    results.jsonl              one line per attack and target, scored; appended to
    claims/                    the claim of every line
    cost-TITLE.json            CPU seconds per iteration of a peer

Importable with torch, numpy, scipy, safetensors and gradleak's sources alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
import networks

from gradleak.metrics import METRICS, label_accuracy, matched
from gradleak.types import Batch, DataSpec


@dataclass(frozen=True)
class Case:
    """A network in evaluation mode and targets, each a batch of equal size.

    Attributes:
        folder: where the case lies.
        about: the contents of `case.json`.
        spec: form of the data.
        network: with the case's weights.
        images: (targets, b, *shape).
        labels: (targets, b) int64.
    """

    folder: Path
    about: dict[str, Any]
    spec: DataSpec
    network: nn.Module
    images: Tensor
    labels: Tensor

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Rebuild the network with the case's weights, and read the truth."""
        if not (folder / "case.json").exists():
            raise SystemExit(f"{folder} holds no case.json: write it with `compare.py case`")
        about = json.loads((folder / "case.json").read_text())
        channels, height, width = about["shape"]
        spec = DataSpec.image((channels, height, width), about["classes"])
        network = networks.build(about["network"], spec, seed=about["seed"])
        network.load_state_dict(load_file(folder / "state.safetensors"))
        truth = load_file(folder / "truth.safetensors")
        return cls(folder, about, spec, network.eval(), truth["images"], truth["labels"])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def batch_size(self) -> int:
        return self.images.shape[1]

    def batch(self, target: int) -> Batch:
        """The truth of one target."""
        return Batch(self.images[target], self.labels[target])

    def gradient(self, target: int) -> dict[str, Tensor]:
        """What the client of one target sends, in the order of the network's parameters."""
        stored = load_file(gradient_file(self.folder, target))
        return {name: stored[name] for name, _ in self.network.named_parameters()}

    def chosen(self, targets: str | None) -> list[int]:
        """Targets named as "0,3", or all of them."""
        if targets is None:
            return list(range(len(self)))
        picked = [int(t) for t in targets.split(",")]
        if any(t not in range(len(self)) for t in picked):
            raise SystemExit(f"targets {targets}: expected numbers from 0 to {len(self) - 1}")
        return picked

    def results(self) -> Iterator[dict[str, Any]]:
        """Results so far, one per attack, knowledge and target."""
        file = self.folder / "results.jsonl"
        if file.exists():
            yield from map(json.loads, file.read_text().splitlines())

    def done(self, attack: str, knows: str, target: int) -> bool:
        """Whether this result is stored already, so that an interrupted run resumes."""
        key = (attack, knows, target)
        return any((r["attack"], r["knows"], r["target"]) == key for r in self.results())

    def append(
        self, attack: str, knows: str, target: int, claim: Batch, seconds: float, **more: object
    ) -> None:
        """Score one claim after one-to-one matching, clamped, peak 1; store and print it."""
        truth = self.batch(target)
        inputs, _ = matched(claim, truth, bounds=self.spec.bounds)
        psnr = METRICS["psnr_db"].each(inputs, truth.inputs.double(), self.spec.bounds).tolist()
        name = f"{slug(attack)}-{slug(knows or 'nothing')}-{target:02d}.safetensors"
        (self.folder / "claims").mkdir(exist_ok=True)
        held = {"inputs": claim.inputs.detach().float(), "labels": claim.classes.detach()}
        save_file({k: v.contiguous() for k, v in held.items()}, self.folder / "claims" / name)
        row = {
            "attack": attack,
            "knows": knows,
            "target": target,
            "psnr_db": psnr,
            "label_accuracy": label_accuracy(claim, truth),
            "cpu_seconds": seconds,
            "claim": name,
            **more,
        }
        with (self.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = " ".join(f"{p:.2f}" for p in psnr)
        print(f"{attack}, target {target}: {shown} dB, {seconds:.1f} CPU s", flush=True)


def write_case(
    folder: Path, *, about: dict[str, Any], network: nn.Module, images: Tensor, labels: Tensor
) -> None:
    """Write a case; the gradients are computed in float64 and stored in float32.

    Args:
        folder: is created.
        about: goes into `case.json`.
        network: in evaluation mode, float32.
        images: (targets, b, *shape).
        labels: (targets, b).
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, folder / "state.safetensors"
    )
    save_file({"images": images, "labels": labels}, folder / "truth.safetensors")
    names = [name for name, _ in network.named_parameters()]
    network = network.double()
    for target in range(len(images)):
        loss = cross_entropy(network(images[target].double()), labels[target])
        gradient = torch.autograd.grad(loss, list(network.parameters()))
        sent = {k: g.float().contiguous() for k, g in zip(names, gradient, strict=True)}
        save_file(sent, gradient_file(folder, target))
    (folder / "case.json").write_text(json.dumps(about, indent=1) + "\n")


def gradient_file(folder: Path, target: int) -> Path:
    """Where the gradient of one target lies, tensors named as the network's parameters."""
    return folder / f"gradient-{target:02d}.safetensors"


def slug(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.=]+", "-", text).strip("-")
