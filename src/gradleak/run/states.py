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

from gradleak import models, priors
from gradleak.data import Dataset
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.mechanisms import Denoising
from gradleak.run.beliefs import check_unseen
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
        weights: file that replaces the initialisation; of weights, or of a diffusion prior.
        seed: fixes the order of training.
        client: whose loss a diffusion model is trained on; None trains a classifier.
        directory: of the run.
        progress: called with (steps done, steps).
    """
    initial = ModelState.of(model)
    if weights:
        initial = _given(weights, model, dataset, public, client)
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


def _given(
    weights: Path, model: nn.Module, dataset: Dataset, public: Tensor, client: Denoising | None
) -> ModelState:
    """The state in a file: weights, or a diffusion prior whose network clients train on.

    Raises:
        InvalidInput: a prior of other data or another schedule, of private examples, or one whose
            network is another.
    """
    try:
        prior = priors.load(weights)
    except CorruptFile:  # no prior: the usual case
        return models.load_weights(weights, model)
    name = f"--weights {weights.stem!r}"
    if client is None or not isinstance(prior, priors.Denoiser):
        raise InvalidInput(f"{name} is a prior: expected one of a denoiser, for clients of one")
    if (prior.data.shape, prior.data.bounds) != (dataset.spec.shape, dataset.spec.bounds):
        raise InvalidInput(f"{name} is of data {prior.data.shape}: expected {dataset.spec.shape}")
    if prior.schedule != client.noise_schedule:
        raise InvalidInput(
            f"{name} was trained under {prior.schedule}: expected the clients' "
            f"{client.noise_schedule}"
        )
    check_unseen(prior, dataset, public, name=name)
    initial = ModelState.of(model)
    found = {k: tuple(v.shape) for k, v in prior.network.items()}
    if found != {k: tuple(v.shape) for k, v in initial.params.items()}:
        raise InvalidInput(
            f"{name} holds another network, {prior.family.width} channels wide"
            f"{' and told classes' * prior.family.conditional}: expected one without classes, of "
            "16 channels for --model unet or of 32 for unet-wide"
        )
    params = {k: prior.network[k].to(old) for k, old in initial.params.items()}
    return dataclasses.replace(initial, params=params)


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
    path = priors.TRAINED.get(weights, Path(weights))
    if not path.is_file():
        raise InvalidInput(f"--weights {weights!r}: no such file")
    return path
