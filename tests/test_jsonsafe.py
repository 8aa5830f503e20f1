"""JSON with non-finite numbers survives a round trip, and is standard JSON."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradleak import jsonsafe

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def same(a: object, b: object) -> bool:
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b and type(a) is type(b)


@given(values)
def test_round_trip(value: object) -> None:
    text = jsonsafe.dumps(value)
    assert "\n" not in text
    assert same(jsonsafe.loads(text), value)


def test_tags() -> None:
    text = jsonsafe.dumps({"a": math.nan, "b": (math.inf, -math.inf)})
    assert json.loads(text) == {
        "a": {"nonfinite": "nan"},
        "b": [{"nonfinite": "inf"}, {"nonfinite": "-inf"}],
    }


@pytest.mark.parametrize("text", ["NaN", "[Infinity]", "{", ""])
def test_refuses_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        jsonsafe.loads(text)
