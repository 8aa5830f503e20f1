"""The prior of a run: fitted once by the parent to public examples, read by every worker."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from gradleak import priors, registry
from gradleak.data import Dataset
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.run.store import TENSORS
from gradleak.types import Prior

_SHARED = 0.01
"""Share of private examples that public ones may repeat: data sets hold copies."""


@dataclass(frozen=True)
class Belief:
    """A prior on disk.

    Attributes:
        spec: notation of the prior with every field.
        path: relative to the run's directory.
        digest: of its content.
    """

    spec: str
    path: str
    digest: str


def prior_spec(spec: str) -> str:
    """Complete the notation of a prior with every field; a file's name stays as it is.

    Raises:
        InvalidInput: unknown prior or field, a value that makes no sense, or no such file.
    """
    file = priors.file_of(spec)
    if file is None:
        return registry.describe(priors.build(spec))
    if not file.is_file():
        raise InvalidInput(f"--prior {spec!r}: no such file")
    return spec


def has_precision(spec: str) -> bool:
    """Whether a prior has Gaussian components, and so an information that bounds can use."""
    return priors.file_of(spec) is None and priors.build(spec).fitted is priors.Gaussians


def fitted(spec: str, dataset: Dataset, public: Tensor, *, seed: int, directory: Path) -> Belief:
    """Fit the prior of a run, or find the one that an earlier part of the run has fitted.

    Args:
        spec: notation of the prior.
        dataset: its public half alone is read.
        public: indices of that half.
        seed: of the fit.
        directory: of the run.
    """
    spec = prior_spec(spec)
    file = priors.file_of(spec)
    if file is not None:
        return _trained(spec, file, dataset, public, directory=directory)
    origin = hashlib.sha256(f"{spec}/{dataset.fingerprint}/{public.tolist()}/{seed}".encode())
    path = directory / TENSORS / f"prior-{origin.hexdigest()[:16]}.safetensors"
    if not path.exists():
        prior = priors.fit(spec, dataset.batch(public), dataset.spec, seed=seed)
        priors.save(prior, path)
    return Belief(spec, f"{TENSORS}/{path.name}", priors.digest(priors.load(path)))


def _trained(spec: str, file: Path, dataset: Dataset, public: Tensor, *, directory: Path) -> Belief:
    """Copy a trained prior into the run, unless it has seen what is private there.

    Raises:
        InvalidInput: a prior of other data, of private examples, or that tells none.
    """
    prior = priors.load(file)
    if not isinstance(prior, priors.Network):
        raise InvalidInput(
            f"--prior {spec!r} does not tell its examples: expected one of `gradleak prior train`"
        )
    if (prior.data.shape, prior.data.bounds) != (dataset.spec.shape, dataset.spec.bounds):
        raise InvalidInput(
            f"--prior {spec!r} is of data {prior.data.shape} in {prior.data.bounds}: "
            f"expected {dataset.spec.shape} in {dataset.spec.bounds}"
        )
    check_unseen(prior, dataset, public, name=f"--prior {spec!r}")
    digest = priors.digest(prior)
    path = directory / TENSORS / f"prior-{digest}.safetensors"
    if not path.exists():
        priors.save(prior, path)
    return Belief(spec, f"{TENSORS}/{path.name}", digest)


def check_unseen(prior: priors.Network, dataset: Dataset, public: Tensor, *, name: str) -> None:
    """Refuse a prior that was trained on what is private in a run.

    Raises:
        InvalidInput: it was.
    """
    private = torch.ones(len(dataset), dtype=torch.bool)
    private[public] = False
    seen = int(prior.seen(dataset.batch(private.nonzero()[:, 0]).inputs).sum())
    if seen > _SHARED * int(private.sum()):
        raise InvalidInput(
            f"{name} was trained on {seen} of the {int(private.sum())} private examples "
            "of this run: expected the --seed that it was trained with, or other data"
        )


@lru_cache(maxsize=2)
def believed(path: Path, digest: str, device: str) -> Prior:
    """Read the prior of a run.

    Raises:
        CorruptFile: the file is not the one that the run has fitted.
    """
    prior = priors.load(path)
    if priors.digest(prior) != digest:
        raise CorruptFile(f"{str(path)!r} changed while the audit was running")
    return prior.to(torch.device(device))
