"""The states that servers broadcast: made once by the parent, read by every worker."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from gradleak import models
from gradleak.data import Dataset
from gradleak.errors import InvalidInput
from gradleak.mechanisms import Denoising
from gradleak.run.store import TENSORS
from gradleak.types import DataSpec, ModelState

GIVEN = "weights"
"""Name of the stage where the state comes from a file of the user's."""


@dataclass(frozen=True)
class Broadcast:
    """A state on disk.

    Attributes:
        path: relative to the run's directory.
        digest: of its content.
    """

    path: str
    digest: str


def prepare(
    model: nn.Module,
    dataset: Dataset,
    public: Tensor,
    *,
    stage: str,
    weights: Path | None,
    seed: int,
    client: Denoising | None = None,
    directory: Path,
    progress: Callable[[int, int], None],
) -> Broadcast:
    """Make the state of one stage, or find the one that an earlier run has made.

    Training uses the public half only, so that a target's image is never in the broadcast state
    and all that leaks comes through the update.

    Args:
        model: the network at initialisation.
        dataset: data to train on.
        public: indices of its public half.
        stage: training stage.
        weights: file that replaces the initialisation.
        seed: fixes the order of training.
        client: whose loss a diffusion model is trained on; None trains a classifier.
        directory: of the run.
        progress: called with (steps done, steps).
    """
    initial = models.load_weights(weights, model) if weights else ModelState.of(model)
    steps = 0 if weights else models.stage_steps(stage)
    of_client = "" if client is None else f"/{client.noise_schedule}/{client.bounds}"
    origin = hashlib.sha256(
        f"{digest(initial)}/{model}/{dataset.fingerprint}/{steps}/{seed}{of_client}".encode()
    ).hexdigest()[:16]
    path = directory / TENSORS / f"state-{origin}.safetensors"
    if not path.exists():
        state = (
            models.train(
                model, dataset, public, steps=steps, seed=seed, client=client, progress=progress
            )
            if steps
            else initial
        )
        _save(state, model, path)
    return Broadcast(f"{TENSORS}/{path.name}", digest(models.load_weights(path, model)))


def keep(state: ModelState, model: nn.Module, directory: Path) -> Broadcast:
    """Write a state that came from elsewhere, unless it is there."""
    content = digest(state)
    path = directory / TENSORS / f"state-{content}.safetensors"
    if not path.exists():
        _save(state, model, path)
    return Broadcast(f"{TENSORS}/{path.name}", content)


def _save(state: ModelState, model: nn.Module, path: Path) -> None:
    stored = model.state_dict().keys() | state.params.keys()
    kept = {name: value for name, value in state.buffers.items() if name in stored}
    models.save_weights(dataclasses.replace(state, buffers=kept), path)


def digest(state: ModelState) -> str:
    """Hash of a state's names, shapes and numbers."""
    content = hashlib.sha256()
    for name, value in sorted({**state.params, **state.buffers}.items()):
        content.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        content.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return content.hexdigest()[:16]


@lru_cache(maxsize=4)
def broadcast(path: Path, model: str, spec: DataSpec, device: str) -> ModelState:
    """Read a prepared state.

    Raises:
        InvalidInput: the file has gone or no longer fits the network.
    """
    template = models.build(model, spec, seed=0)
    return models.load_weights(path, template).to(torch.device(device))


def check_stages(stages: Mapping[str, object] | tuple[str, ...]) -> None:
    """Raise `InvalidInput` for the first stage that does not exist."""
    for stage in stages:
        if stage != GIVEN:
            models.stage_steps(stage)


def file_of(weights: str | None) -> Path | None:
    """The user's weights file, if any."""
    if weights is None:
        return None
    path = Path(weights)
    if not path.is_file():
        raise InvalidInput(f"--weights {weights!r}: no such file")
    return path
