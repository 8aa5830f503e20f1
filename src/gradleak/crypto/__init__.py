"""Secure and encrypted aggregation: protocols that let a server learn a sum and nothing else.

Needs the extra `crypto`. A protocol is an `Aggregation`; `rehearse` plays a whole round of one.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from gradleak import registry
from gradleak.crypto.encoding import Encoding, FixedPoint
from gradleak.crypto.protocol import Aggregation, Party, Server, Step, Terms, Total
from gradleak.crypto.rejection import Aborted, Reason, Rejected
from gradleak.crypto.sheet import Sheet
from gradleak.errors import InvalidInput


@cache
def aggregations() -> dict[str, type[Any]]:
    """Every protocol of this package by its id, sorted: every class with a `Sheet`.

    Raises:
        InvalidInput: the extra is not installed.
    """
    try:
        found = list(registry.defined_in(sys.modules[__name__]))
    except ModuleNotFoundError as error:
        raise InvalidInput(
            f"aggregation needs {error.name}: pip install 'gradleak[crypto]'"
        ) from error
    own = {c.id: c for c in found if isinstance(c.__dict__.get("sheet"), Sheet)}
    return dict(sorted(own.items()))


def build(spec: str) -> Aggregation:
    """Build "id:field=value,...".

    Raises:
        InvalidInput: unknown id or field; names the nearest.
    """
    made: Aggregation = registry.build("aggregation", spec, aggregations())
    return made


__all__ = [
    "Aborted",
    "Aggregation",
    "Encoding",
    "FixedPoint",
    "Party",
    "Reason",
    "Rejected",
    "Server",
    "Sheet",
    "Step",
    "Terms",
    "Total",
    "aggregations",
    "build",
]
