"""Demonstrated against proved: an honest pair passes, a broken limit is an error everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradleak import jsonsafe
from gradleak.report.findings import findings
from gradleak.report.html import render
from gradleak.report.limits import ALPHA, limits, ranking, violations
from gradleak.report.schema import validate_result
from tests.report import synthetic
from tests.report.synthetic import Case

NOISY = "clip:norm=1+gaussian-noise:std=1"


def proved(share: float) -> dict[str, Any]:
    risk = [max(share, 1 - i / 30) for i in range(61)]
    return {"identified": share, "kappa": 0.01, "noise_multiplier": 1.0, "risk": risk}


def broken(hits: list[list[float]], share: float) -> bool:
    (limit,) = limits(proved(share), None, hits, [])
    return bool(violations([limit]))


@pytest.mark.parametrize("n", [8, 64])
def test_an_attack_that_just_reaches_its_limit_is_rarely_called_broken(n: int) -> None:
    """H0: success = limit, 20 000 runs; P(flag) ≤ ALPHA, checked at 1e-6 over binomial noise."""
    rng = np.random.default_rng(0)
    runs = 20_000
    counts = np.bincount(rng.binomial(n, 0.1, runs), minlength=n + 1)
    flagged = sum(
        counts[k]
        for k in range(n + 1)
        if counts[k] and broken([[1.0]] * k + [[0.0]] * (n - k), 0.1)
    )
    assert flagged <= ALPHA * runs + 5 * (ALPHA * runs) ** 0.5


def test_an_attack_far_beyond_its_limit_is_called_broken() -> None:
    assert broken([[1.0]] * 8, 0.1)
    assert not broken([[1.0]] * 2, 0.1), "two clients show too little"
    assert not broken([[1.0]] * 8, 1.0)


def test_where_nothing_is_proved_nothing_is_broken() -> None:
    (limit,) = limits({"why_not": "no noise"}, None, [[1.0]] * 8, [])
    assert (limit["limit"], limit["proved"], limit["why"]) == (None, False, ["no noise"])
    assert not violations([limit])


def test_a_floor_is_a_score_and_beating_it_no_error() -> None:
    floor = {"mse": 0.1, "confidence": 0.95, "n": 40, "unless": ["the prior is fitted"]}
    (limit,) = limits(None, floor, [], [[0.001 * i] for i in range(8)])
    assert limit["broken"]
    assert not limit["proved"]
    assert not violations([limit])


def test_ranks_of_scores() -> None:
    scores = [{"posterior_trace": x, "dfil": 1 / x, "influence": None} for x in (1.0, 2.0, 3.0)]
    assert ranking(scores, [0.1, 0.2, 0.3]) == {
        "posterior_trace": {"rho": pytest.approx(1), "n": 3},
        "dfil": {"rho": pytest.approx(1), "n": 3},
    }
    assert ranking(scores, [0.3, 0.2, 0.1])["dfil"]["rho"] == pytest.approx(-1)
    assert ranking(scores, [0.1] * 3)["dfil"]["rho"] is None, "ties only"
    assert ranking(scores[:2], [0.1, 0.2])["dfil"] == {"rho": None, "n": 2}


def with_bounds(directory: Path, *, share: float, foretold: bool = True) -> dict[str, Any]:
    """A leaking attack under protections, with a ceiling and scores stored beside it."""
    (directory / "tensors").mkdir(parents=True)
    pool = synthetic.digits()
    cases = (Case("none", "dlg", 0.1), Case(NOISY, "idlg", 0.6), Case(NOISY, "dlg", 0.4))
    records = [synthetic.record(c, pool, directory, targets=8, model="mlp") for c in cases]
    for record in records:
        for number, target in enumerate(record["targets"]):
            target["target"] = number
            target["ceiling"] = target["scores"]
        record["proved"] = {"why_not": "there is no protection"}
    for record in records[1:]:
        record["proved"] = proved(share)
    if foretold:
        records[1]["foretold"] = {
            "prior": "gaussian",
            "floor": {"why_not": "too many entries"},
            "targets": [
                {"target": i, "posterior_trace": 10.0 ** -(i % 4 + 1), "dfil": 10.0 ** (i % 4)}
                for i in range(8)
            ],
        }
    result = synthetic.result_of(findings(records))
    validate_result(jsonsafe.loads(jsonsafe.dumps(result)))
    (directory / "result.json").write_text(jsonsafe.dumps(result))
    return result


def test_the_page_shows_both_sides(tmp_path: Path) -> None:
    with_bounds(tmp_path / "out", share=1.0)
    page = render(tmp_path / "out").read_text()
    assert "No attack beats what is proved (1 condition)" in page
    assert "there is no protection" in page
    assert "too many entries" in page
    assert page.count('class="line proved" d="M38.0 ') == 1
    assert page.count('class="line begun" d="M38.0 ') == 2
    assert re.search(r"rank correlation −?\d\.\d\d over 8 targets", page)
    assert "alert broken-limit" not in page


def test_scores_are_shared_by_all_attacks_on_a_condition(tmp_path: Path) -> None:
    bare, first, second = with_bounds(tmp_path / "out", share=1.0)["findings"]
    assert bare["foretold"] is bare["targets"][0]["foretold"] is None
    for finding in (first, second):
        assert [t["foretold"]["posterior_trace"] for t in finding["targets"]][:2] == [0.1, 0.01]
        assert finding["foretold"]["ranking"]["dfil"]["n"] == 8


def test_a_broken_limit_is_an_error_on_the_page_and_never_protected(tmp_path: Path) -> None:
    result = with_bounds(tmp_path / "out", share=0.05, foretold=False)
    for finding in result["findings"][1:]:
        assert len(finding["violations"]) == 1
        assert "at most 5.0% is possible" in finding["violations"][0]
        assert finding["verdict"] != "protected"
    assert not result["findings"][0]["violations"]
    page = render(tmp_path / "out").read_text()
    assert "1 proved limit is broken" in page
    assert page.count('<p class="alert broken-limit">') == 2


def test_older_results_have_no_such_section(typical: Path) -> None:
    page = typical.read_text()
    assert 'id="proved"' not in page
    assert 'id="foretold"' not in page
