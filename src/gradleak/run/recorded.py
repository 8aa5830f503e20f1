"""One attack on an update that somebody recorded: no simulation, no truth, no score."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from gradleak import jsonsafe, models
from gradleak.attacks import attack_all
from gradleak.attacks import build as build_attack
from gradleak.defenses import rebased
from gradleak.errors import CorruptFile, InvalidInput, NotApplicable, nearest
from gradleak.observation import observe
from gradleak.run import memory
from gradleak.run.jobs import attack_spec, check_server, client_of, derive
from gradleak.run.recordings import read_tensors
from gradleak.run.settings import AuditSettings, option, read_config, trains_denoiser
from gradleak.run.store import write_whole
from gradleak.types import DataSpec, Reconstruction, Update

_NEEDED = ("update", "state", "model", "data_spec")
_SHARED = (
    "model", "mechanism", "local_steps", "local_learning_rate", "batch_norm", "batch_size",
    "defense", "server", "seed", "budget", "memory", "out",
)  # fmt: skip
_SPEC_KEYS = ("modality", "shape", "classes", "bounds", "class_names")


@dataclass(frozen=True)
class RecordedSettings:
    """What to attack, and how.

    Attributes:
        update: safetensors file of the update.
        state: safetensors file of the state it answers.
        data_spec: TOML file with the public form of the data.
        labels: labels of the batch, where known.
        settings: the options shared with an audit.
    """

    update: Path
    state: Path
    data_spec: Path
    labels: tuple[int, ...] | None
    settings: AuditSettings

    @classmethod
    def of(cls, attack: str, given: Mapping[str, Any]) -> RecordedSettings:
        """Build from option names.

        Raises:
            InvalidInput: something is missing, or contradicts a recorded update.
        """
        missing = [option(name) for name in _NEEDED if name not in given]
        if missing:
            raise InvalidInput(f"a recorded update also needs {' and '.join(missing)}")
        known = {"identifier", *_NEEDED, "labels", *_SHARED}
        for name in given:
            if name not in known:
                raise InvalidInput(
                    f"{option(name)} contradicts --update: it belongs to a simulated client"
                )
        shared = {name: given[name] for name in _SHARED if name in given}
        shared = {"out": "gradleak-attack", "defense": ["none"]} | shared | {"attack": [attack]}
        try:
            labels = (
                tuple(int(part) for part in str(given["labels"]).split(","))
                if "labels" in given
                else None
            )
        except ValueError:
            raise InvalidInput(
                f"--labels {given['labels']!r}: expected whole numbers, e.g. 3,5"
            ) from None
        return cls(
            Path(given["update"]),
            Path(given["state"]),
            Path(given["data_spec"]),
            labels,
            AuditSettings.of(shared),
        )


@dataclass(frozen=True)
class Claim:
    """What the attack claims, and where it was written.

    Attributes:
        attack: notation of the attack with every field.
        reconstruction: the claim.
        directory: holds reconstruction.safetensors, reconstruction.png and attack.json.
    """

    attack: str
    reconstruction: Reconstruction
    directory: Path


def attack_recorded(
    recorded: RecordedSettings, *, planned: Callable[[str], None] = lambda plan: None
) -> Claim:
    """Attack the update and write the claim.

    Args:
        recorded: what to attack.
        planned: told the memory that is needed, before the work starts.

    Raises:
        InvalidInput: a file does not fit, the attack does not apply, or memory is too small.
    """
    settings = recorded.settings
    check_server(settings.attack[0], settings.server)
    spec = attack_spec(settings.attack[0], budget=settings.budget)
    data = read_data_spec(recorded.data_spec)
    model = models.build(settings.model, data, seed=derive(settings.seed, "model"))
    state = models.load_weights(recorded.state, model)
    sent = read_tensors(recorded.update)
    Update(sent, "gradient")  # refuses an empty file
    buffers = {k: v for k, v in sent.items() if k in state.buffers}
    update = {k: v for k, v in sent.items() if k not in buffers}
    if not any(bool(value.any()) for value in update.values()):
        raise InvalidInput(f"{str(recorded.update)!r}: the update is zero, it shows nothing")
    client = client_of(
        settings.mechanism,
        local_steps=settings.local_steps,
        local_learning_rate=settings.local_learning_rate,
        batch_norm=settings.batch_norm,
        defense=settings.defense[0],
    )
    if trains_denoiser(settings.mechanism):
        client = rebased(client, bounds=data.bounds)
    seen = observe(
        state,
        update=update,
        kind=client.kind,
        data=data,
        mechanism=client,
        batch_size=settings.batch_size[0],
        labels=None if recorded.labels is None else torch.tensor(recorded.labels),
        buffers=buffers,
    )
    seen = dataclasses.replace(seen, server=settings.server)
    attack = build_attack(spec)
    size = settings.batch_size[0]
    need = memory.needed(attack, client, state, data, batch_size=size, targets=1)
    free = memory.free_memory(settings.memory, device="cpu")
    arranged = memory.arranged([need], workers=0, most_workers=1, free=free)
    planned(str(arranged))
    try:
        (claim,) = attack_all(
            attack,
            [seen],
            seed=derive(settings.seed, "attack"),
            trials_at_once=arranged.together[0],
        )
    except NotApplicable as reason:
        raise InvalidInput(f"the attack does not apply: {reason}") from None
    _write(Path(settings.out), claim, spec=spec, recorded=recorded, data=data)
    return Claim(spec, claim, Path(settings.out))


def read_data_spec(path: Path) -> DataSpec:
    """Read the public form of the data: shape and classes, perhaps bounds and class_names.

    Raises:
        InvalidInput: no such file, an unknown key, or values that make no sense.
    """
    try:
        values = read_config(path)
    except tomllib.TOMLDecodeError as error:
        raise CorruptFile(f"{str(path)!r} is not TOML: {error}") from None
    for key in values:
        if key not in _SPEC_KEYS:
            raise InvalidInput(f"{str(path)!r}: unknown key {key!r}, {nearest(key, _SPEC_KEYS)}")
    for key, form in (("shape", "[3, 32, 32]"), ("classes", "10")):
        if key not in values:
            raise InvalidInput(f"{str(path)!r} lacks {key}: expected e.g. {key} = {form}")
    if values.get("modality", "image") != "image":
        raise InvalidInput(f"{str(path)!r}: modality {values['modality']!r}, expected 'image'")
    shape, bounds = values["shape"], values.get("bounds", [0.0, 1.0])
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int for n in shape)):
        raise InvalidInput(f"{str(path)!r}: shape {shape!r}, expected [channels, height, width]")
    if not (
        isinstance(bounds, list)
        and len(bounds) == 2
        and all(type(v) in (int, float) for v in bounds)
    ):
        raise InvalidInput(f"{str(path)!r}: bounds {bounds!r}, expected [low, high]")
    if type(values["classes"]) is not int:
        raise InvalidInput(f"{str(path)!r}: classes {values['classes']!r}, expected e.g. 10")
    return DataSpec.image(
        (shape[0], shape[1], shape[2]),
        values["classes"],
        bounds=(float(bounds[0]), float(bounds[1])),
        class_names=tuple(map(str, values.get("class_names", ()))),
    )


def _write(
    directory: Path,
    claim: Reconstruction,
    *,
    spec: str,
    recorded: RecordedSettings,
    data: DataSpec,
) -> None:
    inputs = claim.batch.inputs.detach().cpu().float()
    tensors = {"inputs": inputs.contiguous(), "labels": claim.batch.labels.detach().contiguous()}
    about = {
        "attack_spec": spec,
        "update": str(recorded.update),
        "state": str(recorded.state),
        "settings": dataclasses.asdict(recorded.settings),
        "status": claim.status,
        "message": claim.message,
        "objective": claim.objective,
        "gradient_evaluations": claim.evaluations,
        "labels": claim.batch.classes.tolist(),
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "reconstruction.safetensors", safetensors.torch.save(tensors))
        write_whole(directory / "attack.json", jsonsafe.dumps(about, indent=1) + "\n")
        _picture(inputs, data).save(directory / "reconstruction.png")
    except OSError as error:
        raise InvalidInput(
            f"cannot write to {str(directory)!r}: {error.strerror or error}"
        ) from None


def _picture(inputs: Tensor, data: DataSpec) -> Image.Image:
    """The claimed images side by side, enlarged to at least 128 pixels a side."""
    low, high = data.bounds
    row = torch.cat(list(inputs.nan_to_num(low)), dim=2)
    grey = row if row.shape[0] in (1, 3) else row.mean(0, keepdim=True)
    pixels = ((grey - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    scale = max(1, -(-128 // image.height))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
