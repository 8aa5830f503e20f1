"""Published tables computed again: a file of this package each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from gradleak.reproductions.reproduction import Reproduction


def _discover() -> dict[str, type[Reproduction]]:
    """Every concrete `Reproduction` in a file of this package, by id."""
    found: dict[str, type[Reproduction]] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for _, thing in inspect.getmembers(module, inspect.isclass):
            if (
                issubclass(thing, Reproduction)
                and not inspect.isabstract(thing)
                and thing.__module__ == module.__name__
            ):
                found[thing.id] = thing
    return dict(sorted(found.items()))


REPRODUCTIONS = _discover()

__all__ = ["REPRODUCTIONS", "Reproduction"]
