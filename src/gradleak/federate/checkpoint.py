"""A training on disk, so that a kill loses at most the round in flight.

    training.json             the record of the rounds
    checkpoint.safetensors    state, nodes' states and clients' memories after the last whole round
    model.safetensors         the state, once training has ended or stopped

The record is written before the checkpoint: a round counts where both have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gradleak import jsonsafe, models
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.run.store import read_json, write_whole
from gradleak.types import ModelState

RECORD, CHECKPOINT, MODEL = "training.json", "checkpoint.safetensors", "model.safetensors"
SCHEMA_VERSION = 1

_LATER = {
    "aggregation": "none",
    "aggregation_clip": 8.0,
    "aggregation_bits": 24,
    "weights": None,
    "samples": 256,
}
"""Settings that records of earlier versions leave out."""


class Checkpoint:
    """One training's directory.

    Args:
        directory: made if missing; that of an earlier run is continued.
        about: settings and environment, for the record.

    Raises:
        InvalidInput: it cannot be written, or holds a training with other settings.
        CorruptFile: it holds something else.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        self.directory = directory
        self.tensors: dict[str, Tensor] = {}
        self.record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            **about,
            "rounds": [],
            "accuracy": None,
            "test_examples": None,
            "test_loss": None,
            "sample_quality": None,
            "status": "interrupted",
            "reason": None,
        }
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidInput(
                f"cannot write to {str(directory)!r}: {error.strerror or error}"
            ) from None
        if (directory / RECORD).exists():
            self._continue()

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The records of whole rounds."""
        return self.record["rounds"]  # type: ignore[no-any-return]

    def keep(self, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Add a whole round and what the next one begins with."""
        self.rounds.append(dict(entry))
        self.record["status"] = "interrupted"  # until somebody says otherwise
        self._write()
        self.tensors = dict(tensors)
        image = safetensors.torch.save(self.tensors, metadata={"rounds": str(len(self.rounds))})
        write_whole(self.directory / CHECKPOINT, image)

    def finish(self, status: str, state: ModelState | None, **more: Any) -> None:
        """Say how it ended, and write the weights."""
        self.record |= {"status": status, **more}
        self._write()
        if state is not None:
            models.save_weights(state, self.directory / MODEL)

    def _write(self) -> None:
        write_whole(self.directory / RECORD, jsonsafe.dumps(self.record, indent=1) + "\n")

    def _continue(self) -> None:
        path = self.directory / RECORD
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("rounds"), list):
            raise CorruptFile(f"{str(path)!r} is not the record of a training")
        mine, other = json.loads(jsonsafe.dumps(self.record["settings"])), found.get("settings")
        if isinstance(other, dict):
            other = _LATER | other
        if mine != other:
            names = [k for k in mine if not isinstance(other, dict) or mine[k] != other.get(k)]
            raise InvalidInput(
                f"{str(self.directory)!r} holds a training with another {', '.join(names)}: "
                "choose another --out"
            )
        self.record |= {k: found[k] for k in ("rounds", "accuracy", "test_examples", "status")}
        self.record |= {k: found.get(k) for k in ("test_loss", "sample_quality")}
        whole = 0
        if (self.directory / CHECKPOINT).exists():
            try:
                with safetensors.safe_open(self.directory / CHECKPOINT, "pt") as file:
                    whole = int(file.metadata()["rounds"])
                    self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except Exception:  # safetensors raises several kinds for damaged headers
                raise CorruptFile(
                    f"{str(self.directory / CHECKPOINT)!r} is not a whole checkpoint: remove the "
                    "directory, or choose another --out"
                ) from None
        del self.rounds[whole:]
