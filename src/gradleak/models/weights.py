"""Weights on disk, as safetensors only: a pickle is never opened."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from gradleak.errors import CorruptFile, InvalidInput
from gradleak.types import ModelState

PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_weights(state: ModelState, path: Path | str) -> None:
    """Write parameters and buffers as safetensors, replacing the file in one step."""
    path = Path(path)
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in {**state.params, **state.buffers}.items()
    }
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, unfinished)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        unfinished.unlink(missing_ok=True)
        raise InvalidInput(f"cannot write weights to {path}: {error}") from error


def load_weights(path: Path | str, model: nn.Module) -> ModelState:
    """Read the parameters and buffers of `model` from a safetensors file.

    Names and shapes must be those of the model's `state_dict`; floating-point numbers are cast to
    the model's types. `model` itself is not changed.

    Raises:
        CorruptFile: not safetensors (a PyTorch pickle included), truncated or corrupted.
        InvalidInput: no such file, other names or shapes, or non-finite numbers.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(9)
        stored = load_file(path)
    except FileNotFoundError as error:
        raise InvalidInput(f"no weights file {path}") from error
    except OSError as error:
        raise InvalidInput(f"cannot read weights {path}: {error.strerror or error}") from error
    except Exception as error:  # safetensors raises several kinds for damaged headers
        reason = (
            "is a PyTorch pickle, which may run code and is never opened: save it again with "
            "safetensors.torch.save_file"
            if start.startswith(PICKLE_STARTS) and start[8:] != b"{"  # a header of 640 bytes, say
            else "is not a whole safetensors file (truncated, corrupted or of another format)"
        )
        raise CorruptFile(f"{path} {reason}") from error

    state = ModelState.of(model)
    known = {**state.params, **state.buffers}
    in_file = model.state_dict()
    unknown = stored.keys() - in_file.keys()
    missing = (known.keys() & in_file.keys()) - stored.keys()
    if missing or unknown:
        raise InvalidInput(
            f"{path} does not fit the model: missing {some(missing)}, unknown {some(unknown)}"
        )
    for name, value in stored.items():
        if value.shape != in_file[name].shape:
            raise InvalidInput(
                f"{path}: {name!r} is {tuple(value.shape)}, the model has "
                f"{tuple(in_file[name].shape)}"
            )
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InvalidInput(f"{path}: {name!r} holds non-finite numbers")
    read = {name: stored[name].to(old) if name in stored else old for name, old in known.items()}
    return replace(
        state,
        params={name: read[name] for name in state.params},
        buffers={name: read[name] for name in state.buffers},
    )


def some(names: set[str]) -> str:
    """Return up to three names for an error message, or "nothing"."""
    shown = ", ".join(sorted(names)[:3])
    return (f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown) or "nothing"
