"""Numbers and sentences as a reader sees them."""

from __future__ import annotations

import math

import pytest

from gradleak.report import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.345, "12.3"),
        (-0.01, "0.0"),
        (-2.5, "−2.5"),
        (None, "–"),
        (True, "–"),
        (math.nan, "undefined"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert wording.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.875, "88 %"), (0.0, "0 %"), (0.002, "0.2 %"), (1.0, "100 %"), (math.nan, "undefined")],
)
def test_percent(value: float, text: str) -> None:
    assert wording.percent(value) == text


def test_decibels_keep_their_unit_only_where_there_is_a_number() -> None:
    assert wording.decibels(31.24) == "31.2 dB"
    assert wording.decibels(None) == "–"
    assert wording.decibels(math.inf) == "∞ dB"


@pytest.mark.parametrize(
    ("value", "text"), [(3.14, "3.1 s"), (61.2, "61 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_seconds(value: float, text: str) -> None:
    assert wording.seconds(value) == text


def test_protections_are_named_with_their_settings() -> None:
    assert wording.protection("none") == ("No protection", "")
    assert wording.protection("dp-sgd:clip=1,std=0.5") == ("dp-sgd", "clip = 1, std = 0.5")
    assert wording.protection("clip:norm=1+top-k") == ("clip + top-k", "norm = 1")


def test_the_verdict_title_counts() -> None:
    counts = {"leaks": 2, "inconclusive": 1, "protected": 0, "untested": 0}
    assert wording.verdict_title(counts) == "Of 3 protections, 2 leak and 1 is inconclusive"
    assert wording.verdict_title({"leaks": 4, "protected": 0}) == "All 4 protections leak"
    assert wording.verdict_title({"protected": 1}) == "Of 1 protection, 1 withstands these attacks"
    assert wording.verdict_title({"leaks": 0}) == "No protection was compared"


def test_a_threat_model_says_what_is_known_and_what_is_not() -> None:
    said = " ".join(wording.threat({"server": "malicious", "view": "aggregate", "knows": []}))
    assert "alter the model" in said
    assert "only the sum" in said
    assert "nothing else" in said
    assert "does not know the protection and its parameters" in said


def test_every_fact_a_threat_model_can_grant_has_words() -> None:
    from gradleak.types import Fact

    assert set(wording.FACTS) == set(Fact)
