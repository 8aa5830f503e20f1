"""JSON that keeps nan and the infinities: each becomes `{"nonfinite": "nan" | "inf" | "-inf"}`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

TAG = "nonfinite"
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> Any:
    """Replace non-finite floats by their tagged strings, and tuples by lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return {TAG: "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """Inverse of `encode`."""
    if isinstance(value, dict):
        if value.keys() == {TAG} and isinstance(value[TAG], str) and value[TAG] in _NONFINITE:
            return _NONFINITE[value[TAG]]
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """Write `value` as standard JSON; without `indent` the text is a single line."""
    return json.dumps(encode(value), indent=indent, allow_nan=False, ensure_ascii=False)


def loads(text: str | bytes) -> Any:
    """Read what `dumps` wrote.

    Raises:
        ValueError: the text is no standard JSON (a bare NaN or Infinity is not).
    """
    return decode(json.loads(text, parse_constant=_refuse))


def _refuse(constant: str) -> Any:
    raise ValueError(f"bare {constant} is not standard JSON")
