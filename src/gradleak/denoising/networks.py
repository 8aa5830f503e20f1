"""Telling networks that denoise from networks that classify."""

from __future__ import annotations

import inspect

from torch import nn


def denoises(network: nn.Module) -> bool:
    """Whether a network is called with images and times, (x_t, times): two required arguments."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 2
