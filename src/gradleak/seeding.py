"""Explicit randomness: every consumer owns a stream derived by name from one seed."""

from __future__ import annotations

import hashlib

import torch


def child(generator: torch.Generator, name: str) -> torch.Generator:
    """Derive the stream `name` from the generator's initial seed.

    Draws from `generator` or from other children never shift it, so adding a draw anywhere leaves
    every other stream as it was.
    """
    digest = hashlib.sha256(f"{generator.initial_seed()}/{name}".encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)


def target_generator(seed: int, target: int) -> torch.Generator:
    """The attacker's stream for the `target`-th observation of an audit with this `seed`."""
    return child(torch.Generator().manual_seed(seed), f"target/{target}")


def normal(
    shape: tuple[int, ...] | torch.Size, *, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    """Standard normal draws made in float64 and rounded, so that dtypes share a stream."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
