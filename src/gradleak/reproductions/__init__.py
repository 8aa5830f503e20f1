"""Published tables computed again: a file of this package each."""

from __future__ import annotations

import inspect
import sys

from gradleak.registry import defined_in
from gradleak.reproductions.reproduction import Reproduction


def _discover() -> dict[str, type[Reproduction]]:
    """Every concrete `Reproduction` in a file of this package, by id."""
    found = {
        thing.id: thing
        for thing in defined_in(sys.modules[__name__])
        if issubclass(thing, Reproduction) and not inspect.isabstract(thing)
    }
    return dict(sorted(found.items()))


REPRODUCTIONS = _discover()

__all__ = ["REPRODUCTIONS", "Reproduction"]
