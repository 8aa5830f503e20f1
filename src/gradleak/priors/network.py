"""Priors that are networks: trained step by step, so that a training can be killed and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gradleak import registry
from gradleak.errors import Diverged, InvalidInput
from gradleak.priors.family import Family, Fitted
from gradleak.seeding import child
from gradleak.types import Batch, DataSpec, cast

_SECONDS_BETWEEN_CHECKPOINTS = 20.0
_EXAMPLES = "examples"


@dataclass(frozen=True, eq=False)
class Network(Fitted):
    """A prior whose fitted numbers are a network's weights.

    Attributes:
        weights: by name.
        examples: fingerprints of the examples it was trained on, sorted.
    """

    weights: Mapping[str, Tensor]
    examples: Tensor

    @classmethod
    def of(cls, family: Any, data: DataSpec, tensors: Mapping[str, Tensor]) -> Self:
        weights = {k: v for k, v in tensors.items() if k != _EXAMPLES}
        return cls(family, data, weights, tensors[_EXAMPLES])

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**self.weights, _EXAMPLES: self.examples}

    def to(self, target: torch.dtype | torch.device) -> Self:
        return dataclasses.replace(self, weights=cast(self.weights, target))

    def seen(self, inputs: Tensor) -> Tensor:
        """Which of these examples (n, *shape) it was trained on: (n,) bool."""
        return torch.isin(fingerprints(inputs, self.data), self.examples)


class Trainable(Family, Protocol):
    """A family whose priors are trained in steps of minibatches."""

    @property
    def steps(self) -> int: ...

    @property
    def batch_size(self) -> int: ...

    def begin(self, data: DataSpec, *, seed: int) -> Training: ...


class Training(ABC):
    """A training under way.

    Attributes:
        modules: whatever steps change, by name.
        optimisers: of some of the modules, by the same names.
    """

    modules: dict[str, nn.Module]
    optimisers: dict[str, torch.optim.Adam]

    def to(self, device: torch.device | str) -> None:
        """Move whatever steps change."""
        for module in self.modules.values():
            module.to(device)

    @abstractmethod
    def step(self, inputs: Tensor, labels: Tensor, *, generator: torch.Generator) -> float:
        """Learn from a minibatch (n, *shape) in float32 and its classes (n,); return the loss."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """What the prior keeps."""

    def save(self, path: Path, *, key: str, done: int) -> None:
        """Write all that a later step depends on, replacing the file in one step."""
        tensors = {
            f"{name}/{k}": v.contiguous()
            for name, module in self.modules.items()
            for k, v in module.state_dict().items()
        }
        for name, optimiser in self.optimisers.items():
            for index, moments in optimiser.state_dict()["state"].items():
                tensors |= {f"adam {name}/{index}/{k}": v for k, v in moments.items()}
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        note = json.dumps({"key": key, "done": done})
        unfinished.write_bytes(safetensors.torch.save(tensors, {"gradleak-training": note}))
        unfinished.replace(path)

    def resume(self, path: Path, *, key: str) -> int:
        """Continue the training of this key that a file holds: the steps done, 0 without one."""
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                note = json.loads(file.metadata()["gradleak-training"])
                if note["key"] != key:
                    return 0
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception:  # no file, or a damaged one: the training begins anew
            return 0
        for name, module in self.modules.items():
            module.load_state_dict({k: tensors[f"{name}/{k}"] for k in module.state_dict()})
        for name, optimiser in self.optimisers.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for entry, value in tensors.items():
                owner, *place = entry.split("/")
                if owner == f"adam {name}":
                    moments.setdefault(int(place[0]), {})[place[1]] = value
            optimiser.load_state_dict(optimiser.state_dict() | {"state": moments})
        return int(note["done"])


def train(
    family: Trainable,
    public: Batch,
    data: DataSpec,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    device: torch.device | str = "cpu",
) -> Network:
    """Train a prior on public examples; a resumed training ends where an unbroken one does.

    All draws are made on the CPU, so that devices share them; other devices round otherwise, and
    some do not sum twice alike.

    Args:
        family: what is trained.
        public: examples that anybody may have; never a private one.
        data: form of the data.
        seed: fixes weights, minibatches and noise.
        checkpoint: file that holds the training while it lasts.
        progress: told the steps done and all steps.
        device: where the steps are made; a checkpoint of one goes on with another.

    Raises:
        Diverged: the loss is no longer finite.
    """
    training = family.begin(data, seed=seed)
    training.to(device)
    examples = fingerprints(public.inputs, data).sort().values
    origin = hashlib.sha256(examples.numpy().tobytes()).hexdigest()
    key = f"{registry.describe(family)}/{seed}/{origin}"
    done = training.resume(checkpoint, key=key) if checkpoint is not None else 0
    inputs = public.inputs.float()
    saved = time.monotonic()
    source = torch.Generator().manual_seed(seed)
    for step in range(done, family.steps):
        stream = child(source, f"step/{step}")
        chosen = torch.randint(len(inputs), (family.batch_size,), generator=stream)
        with torch.enable_grad():
            loss = training.step(
                inputs[chosen].to(device), public.classes[chosen].to(device), generator=stream
            )
        if not math.isfinite(loss):
            raise Diverged(f"prior {family.id!r}: loss {loss} at step {step + 1}")
        if checkpoint is not None and time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            training.save(checkpoint, key=key, done=step + 1)
            saved = time.monotonic()
        progress(step + 1, family.steps)
    training.to("cpu")
    found = family.fitted.of(family, data, {**training.weights(), _EXAMPLES: examples})
    assert isinstance(found, Network)
    return found


def fingerprints(inputs: Tensor, data: DataSpec) -> Tensor:
    """63-bit digests of examples (n, *shape), their values rounded to 256 levels.

    Equal pictures have equal fingerprints whatever data set, type or order they came in.
    """
    low, high = data.bounds
    levels = ((inputs.double() - low) * (255 / (high - low))).round().clamp(0, 255)
    rows = levels.to(torch.uint8).flatten(1).numpy()
    digests = [
        int.from_bytes(hashlib.sha256(r.tobytes()).digest()[:8], "little") >> 1 for r in rows
    ]
    return torch.tensor(digests, dtype=torch.int64)


def initialised(build: Callable[[], nn.Module], generator: torch.Generator) -> nn.Module:
    """Build a network from this stream, leaving the global one alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        return build()


def check_training(**values: float) -> None:
    """Raise `InvalidInput` for a rate that is not positive."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise InvalidInput(f"{name}={value}: expected a positive number")
