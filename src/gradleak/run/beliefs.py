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
from gradleak.errors import CorruptFile
from gradleak.run.store import TENSORS
from gradleak.types import Prior


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
    """Complete the notation of a prior with every field.

    Raises:
        InvalidInput: unknown prior or field, or a value that makes no sense.
    """
    return registry.describe(priors.build(spec))


def has_precision(spec: str) -> bool:
    """Whether a prior has Gaussian components, and so an information that bounds can use."""
    return priors.build(spec).fitted is priors.Gaussians


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
    origin = hashlib.sha256(f"{spec}/{dataset.fingerprint}/{public.tolist()}/{seed}".encode())
    path = directory / TENSORS / f"prior-{origin.hexdigest()[:16]}.safetensors"
    if not path.exists():
        prior = priors.fit(spec, dataset.batch(public), dataset.spec, seed=seed)
        priors.save(prior, path)
    return Belief(spec, f"{TENSORS}/{path.name}", priors.digest(priors.load(path)))


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
