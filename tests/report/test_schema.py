"""result.json is checked before anything is rendered, with one clear line."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from gradleak import jsonsafe
from gradleak.errors import CorruptFile
from gradleak.report.schema import SCHEMA, validate_result
from tests.report import synthetic
from tests.report.synthetic import Case


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("schema") / "out"
    cases = (Case("none", "dlg", 0.1), Case("clip:norm=1", "dlg", 0.0, state="error", reason="x"))
    synthetic.write(directory, cases, targets=2)
    return dict(jsonsafe.loads((directory / "result.json").read_text()))


def test_what_findings_writes_is_valid(valid: dict[str, Any]) -> None:
    validate_result(valid)


def test_numbers_may_be_tagged_or_decoded(valid: dict[str, Any]) -> None:
    for value in (math.nan, math.inf, -math.inf):
        result = copy.deepcopy(valid)
        result["findings"][0]["measurements"]["psnr_db"]["value"] = value
        validate_result(result)
        validate_result(json.loads(jsonsafe.dumps(result)))


def test_unknown_keys_are_allowed(valid: dict[str, Any]) -> None:
    result = copy.deepcopy(valid)
    result["novelty"] = result["findings"][0]["novelty"] = {"any": ["thing"]}
    validate_result(result)


def _set(path: str, value: object) -> Any:
    def change(result: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        place: Any = result
        for step in parents:
            place = place[int(step)] if step.isdigit() else place[step]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("schema_version", 2, "newer"),
        ("schema_version", "1", "schema_version is '1': expected one of 1"),
        ("schema_version", True, "schema_version is True"),
        ("findings", KeyError, "has no 'findings'"),
        ("findings", {}, "findings is {}: expected a list"),
        ("seconds", "long", "seconds is 'long': expected a number"),
        ("seconds", {"nonfinite": "huge"}, "seconds is"),
        ("not_tested", [3], "not_tested[0] is 3: expected a text"),
        ("findings/0/state", "fine", "expected one of measured, inconclusive"),
        ("findings/0/verdict", "safe", "expected one of leaks, protected, inconclusive, null"),
        ("findings/0/id", None, "findings[0].id is None: expected a text"),
        ("findings/0/trials/run", -1, "out of range"),
        ("findings/0/trials/run", 1.5, "expected a whole number"),
        ("findings/0/trials/solved", 99, "expected no more than were run"),
        ("findings/0/measurements/psnr_db", KeyError, "measurements.psnr_db is missing"),
        ("findings/0/measurements/psnr_db/low", 999.0, "expected low <= high"),
        ("findings/0/measurements/psnr_db/n", "8", "expected a whole number"),
        ("findings/0/measurements/psnr_db/confidence", 95, "out of range"),
        ("findings/0/threat/server", "evil", "expected one of honest, malicious"),
        ("findings/0/trials", KeyError, "trials is missing"),
        ("findings/0/targets/0/status", KeyError, "findings[0].targets[0] has no 'status'"),
        ("findings/0/targets/0/scores/psnr_db", 3.0, "expected a list"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    valid: dict[str, Any], path: str, value: object, words: str
) -> None:
    result = copy.deepcopy(valid)
    _set(path, value)(result)
    with pytest.raises(CorruptFile) as error:
        validate_result(result)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("obj", [None, [], "text", 3, {}])
def test_something_else_altogether_is_refused(obj: object) -> None:
    with pytest.raises(CorruptFile):
        validate_result(obj)


def test_the_schema_is_standard_json_schema(valid: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="an independent validator")
    jsonschema.validate(json.loads(jsonsafe.dumps(valid)), SCHEMA)
