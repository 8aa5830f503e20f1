"""The form of result.json, as a JSON Schema, and the check that a file has it.

`SCHEMA` is plain JSON Schema (draft 2020-12), so other tools can use it unchanged. A number that
JSON cannot write is tagged, ``{"nonfinite": "nan" | "inf" | "-inf"}``; once decoded it is a float,
and both forms are valid here. Unknown keys are allowed: the format grows by addition.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradleak.errors import CorruptFile

SCHEMA_VERSION = 1

_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_NONFINITE: dict[str, Any] = {
    "type": "object",
    "required": ["nonfinite"],
    "properties": {"nonfinite": {"enum": ["nan", "inf", "-inf"]}},
}
_NUMBER: dict[str, Any] = {"anyOf": [{"type": "number"}, _NONFINITE]}
_NUMBER_OR_NULL: dict[str, Any] = {"anyOf": [{"type": "number"}, _NONFINITE, {"type": "null"}]}
_MEASUREMENT: dict[str, Any] = {
    "type": "object",
    "required": ["value", "low", "high", "confidence", "n", "unit"],
    "properties": {
        "value": _NUMBER_OR_NULL,
        "low": _NUMBER_OR_NULL,
        "high": _NUMBER_OR_NULL,
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        "n": _COUNT,
        "unit": _TEXT,
        "baseline": _NUMBER_OR_NULL,
        "control": _NUMBER_OR_NULL,
        "original": _NUMBER_OR_NULL,
        "ceiling": _NUMBER_OR_NULL,
        "bank_size": {"anyOf": [_COUNT, {"type": "null"}]},
        "chance": _NUMBER_OR_NULL,
    },
}
_SCORES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "array", "items": _NUMBER_OR_NULL},
}
_TARGET: dict[str, Any] = {
    "type": "object",
    "required": ["status"],
    "properties": {
        "status": _TEXT,
        "message": {"anyOf": [_TEXT, {"type": "null"}]},
        "objective": _NUMBER_OR_NULL,
        "objective_at_truth": _NUMBER_OR_NULL,
        "scores": _SCORES,
        "control": {"anyOf": [_SCORES, {"type": "null"}]},
        "original": {"anyOf": [_SCORES, {"type": "null"}]},
        "ceiling": {"anyOf": [_SCORES, {"type": "null"}]},
        "baselines": {"type": "object", "additionalProperties": _SCORES},
        "foretold": {"anyOf": [{"type": "object"}, {"type": "null"}]},
    },
}
_LIMIT: dict[str, Any] = {
    "type": "object",
    "required": ["metric", "side", "limit", "proved", "demonstrated", "broken", "why"],
    "properties": {
        "metric": {"enum": ["identified", "mse"]},
        "side": {"enum": ["at most", "at least"]},
        "limit": _NUMBER_OR_NULL,
        "proved": {"type": "boolean"},
        "demonstrated": {
            "type": "object",
            "required": ["value", "low", "high", "confidence", "n"],
            "additionalProperties": _NUMBER,
        },
        "broken": {"type": "boolean"},
        "why": _TEXTS,
        "kappa": _NUMBER,
        "noise_multiplier": _NUMBER,
        "epsilon": _NUMBER,
        "delta": _NUMBER,
        "accounted": {"type": "object"},
        "risk": {"type": "array", "items": _NUMBER},
    },
}
_FINDING: dict[str, Any] = {
    "type": "object",
    "required": ["id", "state", "scenario", "attack", "defense"],
    "properties": {
        "id": _TEXT,
        "state": {
            "enum": ["measured", "inconclusive", "unscored", "not_applicable", "not_run", "error"]
        },
        "scenario": {
            "type": "object",
            "required": ["data", "model"],
            "properties": {"clients": _COUNT, "honest_clients": _COUNT},
        },
        "threat": {
            "type": "object",
            "properties": {
                "server": {"enum": ["honest", "malicious"]},
                "view": {"enum": ["client", "aggregate"]},
                "colluding": _COUNT,
                "knows": _TEXTS,
            },
        },
        "attack": _TEXT,
        "attack_spec": _TEXT,
        "defense": _TEXT,
        "defense_spec": _TEXT,
        "adaptive": {"type": "boolean"},
        "measurements": {"type": "object", "additionalProperties": _MEASUREMENT},
        "trials": {"type": "object", "additionalProperties": _COUNT},
        "missed": {"type": "object", "additionalProperties": _COUNT},
        "cost": {"type": "object", "additionalProperties": _NUMBER_OR_NULL},
        "verdict": {"enum": ["leaks", "protected", "inconclusive", None]},
        "warnings": _TEXTS,
        "reason": {"anyOf": [_TEXT, {"type": "null"}]},
        "limits": {"type": "array", "items": _LIMIT},
        "violations": _TEXTS,
        "foretold": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        "targets": {"type": "array", "items": _TARGET},
        "tensors": _TEXTS,
    },
}
SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "gradleak result.json",
    "type": "object",
    "required": [
        "schema_version",
        "gradleak_version",
        "settings",
        "environment",
        "seconds",
        "findings",
    ],
    "properties": {
        "schema_version": {"enum": [SCHEMA_VERSION]},
        "gradleak_version": _TEXT,
        "settings": {"type": "object"},
        "environment": {"type": "object"},
        "seconds": _NUMBER,
        "headline": _TEXT,
        "command": _TEXT,
        "not_tested": _TEXTS,
        "fail_on": {"type": "array"},
        "findings": {"type": "array", "items": _FINDING},
    },
}

_MEASURED_KEYS = ("threat", "measurements", "trials", "verdict")


def validate_result(obj: object, *, name: str = "result.json") -> None:
    """Check that `obj` (parsed JSON, non-finite numbers decoded or tagged) is a valid result.

    Args:
        obj: what the JSON parser returned.
        name: how the one-line error names the file.

    Raises:
        CorruptFile: the first thing that is wrong, where it is, and what was expected.
    """
    if isinstance(obj, Mapping):
        version = obj.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise CorruptFile(
                f"{name} has schema_version {version}: this gradleak reads {SCHEMA_VERSION}, "
                "a newer one wrote the file"
            )
    problem = _problem(obj, SCHEMA, "")
    if problem:
        raise CorruptFile(f"{name}: {problem}")
    assert isinstance(obj, Mapping)
    for position, finding in enumerate(obj["findings"]):
        problem = _inconsistency(finding)
        if problem:
            raise CorruptFile(f"{name}: findings[{position}] ({finding['id']}): {problem}")


def _inconsistency(finding: Mapping[str, Any]) -> str | None:
    """What a schema cannot say: measured findings are complete and their counts add up."""
    if finding["state"] not in ("measured", "inconclusive"):
        return None
    missing = [key for key in _MEASURED_KEYS if key not in finding]
    if missing:
        return f"{finding['state']}, but {', '.join(missing)} is missing"
    if "psnr_db" not in finding["measurements"]:
        return f"{finding['state']}, but measurements.psnr_db is missing"
    trials = finding["trials"]
    run, solved = trials.get("run", 0), trials.get("solved", 0)
    if solved > run:
        return f"{solved} of {run} targets solved: expected no more than were run"
    for metric, m in finding["measurements"].items():
        low, high = m["low"], m["high"]
        if isinstance(low, (int, float)) and isinstance(high, (int, float)) and low > high:
            return f"interval of {metric} is ({low}, {high}): expected low <= high"
    return None


_KINDS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "object": ("an object", Mapping),
    "array": ("a list", list),
    "string": ("a text", str),
    "boolean": ("true or false", bool),
    "null": ("null", type(None)),
    "integer": ("a whole number", int),
    "number": ("a number", (int, float)),
}


def _problem(value: object, schema: Mapping[str, Any], where: str) -> str | None:
    """Return what is wrong with `value`, or None: the part of JSON Schema that `SCHEMA` uses."""
    at = where or "the file"
    if "anyOf" in schema:
        problems = [_problem(value, option, where) for option in schema["anyOf"]]
        return None if None in problems else problems[0]
    if "enum" in schema:
        if any(value == choice and type(value) is type(choice) for choice in schema["enum"]):
            return None
        return f"{at} is {_short(value)}: expected one of {_listed(schema['enum'])}"
    kind = schema.get("type")
    if kind is not None:
        words, types = _KINDS[kind]
        is_boolean = isinstance(value, bool)
        if not isinstance(value, types) or (is_boolean and kind != "boolean"):
            return f"{at} is {_short(value)}: expected {words}"
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if isinstance(value, (int, float)) and (value < low or value > high):
        return f"{at} is {value}: out of range"
    if isinstance(value, Mapping):
        known = schema.get("properties", {})
        for key in schema.get("required", ()):
            if key not in value:
                return f"{at} has no {key!r}"
        for key, item in value.items():
            inner = known.get(key, schema.get("additionalProperties"))
            problem = inner and _problem(item, inner, f"{where}.{key}" if where else str(key))
            if problem:
                return str(problem)
    if isinstance(value, list) and "items" in schema:
        for position, item in enumerate(value):
            problem = _problem(item, schema["items"], f"{where}[{position}]")
            if problem:
                return problem
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _listed(choices: Sequence[object]) -> str:
    return ", ".join("null" if choice is None else str(choice) for choice in choices)
