"""gradleak measures what a federated-learning server can reconstruct from client updates.

    scenario --simulate--> observation --attack--> reconstruction --metrics--> measurement

Names load on first use, so that importing the package is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Batch": "gradleak.types",
    "DataSpec": "gradleak.types",
    "Fact": "gradleak.types",
    "FedAvg": "gradleak.mechanisms",
    "FedSGD": "gradleak.mechanisms",
    "GradleakError": "gradleak.errors",
    "InvalidInput": "gradleak.errors",
    "LeakageReport": "gradleak.auditing",
    "ModelState": "gradleak.types",
    "NotApplicable": "gradleak.errors",
    "Observation": "gradleak.types",
    "Reconstruction": "gradleak.types",
    "Scenario": "gradleak.scenario",
    "ThreatModel": "gradleak.threat",
    "Update": "gradleak.types",
    "attack_all": "gradleak.attacks",
    "audit": "gradleak.auditing",
    "observe": "gradleak.observation",
    "simulate": "gradleak.scenario",
}
_MODULES = ("attacks", "data", "defenses", "metrics", "models")

__all__ = [
    "Batch",
    "DataSpec",
    "Fact",
    "FedAvg",
    "FedSGD",
    "GradleakError",
    "InvalidInput",
    "LeakageReport",
    "ModelState",
    "NotApplicable",
    "Observation",
    "Reconstruction",
    "Scenario",
    "ThreatModel",
    "Update",
    "__version__",
    "attack_all",
    "attacks",
    "audit",
    "data",
    "defenses",
    "metrics",
    "models",
    "observe",
    "simulate",
]

if TYPE_CHECKING:
    from gradleak import attacks, data, defenses, metrics, models
    from gradleak.attacks import attack_all
    from gradleak.auditing import LeakageReport, audit
    from gradleak.errors import GradleakError, InvalidInput, NotApplicable
    from gradleak.mechanisms import FedAvg, FedSGD
    from gradleak.observation import observe
    from gradleak.scenario import Scenario, simulate
    from gradleak.threat import ThreatModel
    from gradleak.types import (
        Batch,
        DataSpec,
        Fact,
        ModelState,
        Observation,
        Reconstruction,
        Update,
    )


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"gradleak.{name}")
    raise AttributeError(f"module 'gradleak' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
