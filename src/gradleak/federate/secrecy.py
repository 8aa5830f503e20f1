"""Randomness that nobody can replay."""

from __future__ import annotations

import secrets

import numpy as np
import torch

_WORDS = slice(24, 24 + 624 * 8)
"""Where PyTorch's generator keeps the 624 words of its Mersenne twister, 64 bits for each."""


def secret_generator() -> torch.Generator:
    """A generator whose whole state comes from the operating system.

    PyTorch keeps 32 bits of a seed, which an attacker can try one by one: the noise of a seeded
    generator is no secret. The twister itself is not a cryptographic generator: whoever sees many
    of its raw words can foretell the next.
    """
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    state = generator.get_state().numpy()
    words = np.frombuffer(secrets.token_bytes(4 * 624), np.uint32).astype(np.uint64)
    state[_WORDS] = words.view(np.uint8)
    return generator.set_state(torch.from_numpy(state))
