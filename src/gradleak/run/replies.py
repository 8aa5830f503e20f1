"""Jobs of an audit of recorded updates: what they attack, and what they are scored against.

    tensors/updates-DIGEST.safetensors   TARGET/update/NAME and TARGET/buffer/NAME; public
    tensors/DIGEST.pool.safetensors      images and labels: truths, other private, public examples

The first never holds a private example; only the scoring code opens the second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from gradleak.data import Dataset, Split
from gradleak.defenses import asks_for_public, informed, rebased, undefended
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.mechanisms import Diffusing
from gradleak.observation import observe
from gradleak.run.jobs import JobSpec, mechanism_of
from gradleak.run.recordings import read_tensors
from gradleak.run.states import broadcast
from gradleak.run.store import TENSORS, write_whole
from gradleak.types import Batch, DataSpec, Fact, Mechanism, ModelState, Observation

PUBLIC = 4096
"""Public examples that a malicious server looks at, and that protections are told of."""

POOL = ".pool.safetensors"

Sent = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""An update, and the fixed tensors that came with it."""


def store_updates(directory: Path, sent: Mapping[int, Sent], spec: DataSpec) -> tuple[str, str]:
    """Write the updates of some targets; returns the file in `directory`, and its digest."""
    tensors = {
        f"{target}/{part}/{name}": value.contiguous()
        for target, both in sent.items()
        for part, values in zip(("update", "buffer"), both, strict=True)
        for name, value in values.items()
    }
    return _store(directory, tensors, "updates-{}.safetensors", spec)


def store_pool(
    directory: Path, truths: Iterable[Batch], rest: Iterable[Batch], spec: DataSpec
) -> tuple[str, str]:
    """Write truths in the order of the targets, then other examples; as `store_updates`."""
    batches = [*truths, *rest]
    tensors = {
        "images": torch.cat([b.inputs for b in batches]),
        "labels": torch.cat([b.classes for b in batches]),
    }
    return _store(directory, tensors, "{}" + POOL, spec)


@lru_cache(maxsize=2)
def read_pool(path: Path) -> Dataset:
    """The examples that a recorded audit is scored with."""
    stored, spec = read_tensors(path), _spec(path)
    return Dataset.of(
        "recorded",
        stored["images"],
        stored["labels"],
        classes=spec.classes,
        class_names=spec.class_names,
    )


def pool_split(job: JobSpec, dataset: Dataset) -> Split:
    """Truths and other private examples come first, public ones last."""
    return Split(torch.arange(job.bank), torch.arange(job.bank, len(dataset)))


def replies(job: JobSpec, truths: Dataset | None) -> list[Observation]:
    """What the attacker sees of a job's targets.

    Args:
        job: of a recorded audit.
        truths: its pool; the labels that the threat model grants and public examples alone are
            taken from it.
    """
    path = Path(job.directory) / str(job.updates)
    spec = _spec(path)
    state = state_of(job, spec)
    client = client_told(job, truths)
    if isinstance(undefended(client), Diffusing):
        client = rebased(client, bounds=spec.bounds)
    belief = client if Fact.MECHANISM in job.knows else undefended(client)
    stored = read_tensors(path)
    seen = []
    for target in job.targets:
        labels = None
        if Fact.LABELS in job.knows and truths is not None:
            first = target * job.batch_size
            labels = truths.labels[first : first + job.batch_size].clone()
        one = observe(
            state,
            update=_part(stored, f"{target}/update/", job),
            kind=client.kind,
            data=spec,
            mechanism=belief,
            batch_size=job.batch_size,
            labels=labels,
            buffers=_part(stored, f"{target}/buffer/", job),
        )
        seen.append(dataclasses.replace(one, server=job.threat.server))
    return seen


def client_told(job: JobSpec, truths: Dataset | None) -> Mechanism:
    """The client of a job, told of public examples where there are some."""
    client = mechanism_of(job)
    if truths is None:
        return client
    return told(client, truths, pool_split(job, truths).public)


def told(client: Mechanism, dataset: Dataset, public: Tensor) -> Mechanism:
    """A client, told of the data's bounds and, if any layer asks, of the first public examples."""
    if isinstance(undefended(client), Diffusing):
        client = rebased(client, bounds=dataset.spec.bounds)
    return informed(client, dataset.batch(public[:PUBLIC])) if asks_for_public(client) else client


def state_of(job: JobSpec, spec: DataSpec) -> ModelState:
    """What the clients of a job were sent."""
    return broadcast(Path(job.directory) / job.state, job.model, spec, job.device)


def _part(stored: Mapping[str, Tensor], prefix: str, job: JobSpec) -> dict[str, Tensor]:
    return {
        k.removeprefix(prefix): v.to(job.device) for k, v in stored.items() if k.startswith(prefix)
    }


def _store(
    directory: Path, tensors: Mapping[str, Tensor], name: str, spec: DataSpec
) -> tuple[str, str]:
    metadata = {"spec": json.dumps(dataclasses.asdict(spec))}
    content = safetensors.torch.save(dict(tensors), metadata=metadata)
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = f"{TENSORS}/{name.format(digest)}"
    if not (directory / path).exists():
        write_whole(directory / path, content)
    return path, digest


def _spec(path: Path) -> DataSpec:
    try:
        with safe_open(path, "pt") as file:
            values: dict[str, Any] = json.loads(file.metadata()["spec"])
    except OSError as error:
        raise InvalidInput(f"cannot read {str(path)!r}: {error}") from None
    except Exception:  # safetensors raises several kinds for damaged headers
        raise CorruptFile(f"{str(path)!r} changed while the audit was running") from None
    lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return DataSpec(**(values | lists))
