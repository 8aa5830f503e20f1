"""Label recovery: what the gradient of the head says of the classes in a batch."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from gradleak.attacks.labels.rule import LabelRule, RuleAbout
from gradleak.registry import build as _build

__all__ = ["LABEL_RULES", "LabelRule", "RuleAbout", "build"]


def _discover() -> dict[str, type[Any]]:
    """Every class with its own `about` in a file of this package, by id."""
    found: dict[str, type[Any]] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for _, thing in inspect.getmembers(module, inspect.isclass):
            about = thing.__dict__.get("about")
            if isinstance(about, RuleAbout) and thing.__module__ == module.__name__:
                found[about.id] = thing
    return dict(sorted(found.items()))


LABEL_RULES: dict[str, type[Any]] = _discover()


def build(spec: str) -> LabelRule:
    """Build a rule from "id:field=value,..."."""
    rule: LabelRule = _build("label rule", spec, LABEL_RULES)
    return rule
