"""report.html: complete, self-contained, and standing whatever the findings hold."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gradleak import jsonsafe
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.report import view
from gradleak.report.html import compose, render
from tests.report import synthetic
from tests.report.synthetic import Case

VOID = {"meta", "link", "img", "br", "hr", "input", "path", "rect", "circle"}


class Page(HTMLParser):
    """A parsed page: its elements, its text, and whether its tags balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))
        if tag not in VOID and tag not in ("li", "p", "dt", "dd", "tr", "td", "th"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
        else:
            assert tag not in self._open, f"</{tag}> closes across {self._open[-1]}"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data
            if re.fullmatch("h[1-6]", self._open[-1]):
                level, words = self.headings[-1]
                self.headings[-1] = (level, words + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module", params=["typical", "broad"])
def page(request: pytest.FixtureRequest) -> Page:
    report: Path = request.getfixturevalue(request.param)
    return Page(report.read_text(encoding="utf-8"))


NEWER = ("attack_spec", "defense_spec", "targets", "tensors", "bank_size")
SECTIONS = (
    "verdicts",
    "pictures",
    "numbers",
    "risk",
    "misses",
    "threat",
    "not-tested",
    "reproduce",
    "definitions",
    "details",
)


def test_the_sections_come_in_the_order_of_a_reader(page: Page) -> None:
    ids = [a["id"] for a in page.all("section") if a.get("id")]
    assert [i for i in ids if i in SECTIONS] == list(SECTIONS)
    links = [a["href"] for a in page.all("a") if "skip" not in (a.get("class") or "")]
    assert links == [f"#{i}" for i in ids]


def test_the_table_has_the_columns_of_the_evidence(typical: Path) -> None:
    head = re.search(r"<thead>(.*?)</thead>", typical.read_text(), re.S)
    assert head is not None
    assert re.findall(r'<th scope="col">(.*?)</th>', head[1]) == [
        "Protection",
        "Attack, verdict",
        "PSNR, dB",
        "Guess",
        "Control",
        "Identified",
        "Excess",
        "SSIM",
        "Labels",
        "Recovered",
        "n",
    ]


def test_the_page_opens_with_the_finding(typical: Path) -> None:
    page = Page(typical.read_text())
    level, words = page.headings[0]
    assert level == 1
    assert re.fullmatch(r"The server recovers \d+ of 8 images from undefended updates", words)


def test_headings_descend_one_level_at_a_time(page: Page) -> None:
    levels = [level for level, _ in page.headings]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(words.strip() for _, words in page.headings)


def test_every_picture_has_a_text(page: Page) -> None:
    assert page.all("img")
    assert all((image.get("alt") or "").strip() for image in page.all("img"))
    for svg in page.all("svg"):
        named = svg.get("role") == "img" and svg.get("aria-label")
        assert named or svg.get("aria-hidden") == "true"


def test_the_page_needs_nothing_but_itself(page: Page, typical: Path) -> None:
    assert not page.all("script")
    assert not re.search(r"https?:", typical.read_text())
    assert not re.search(r"url\(|@import", typical.read_text())
    assert all((image["src"] or "").startswith("data:image/png") for image in page.all("img"))
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    policy = page.all("meta")[1]["content"] or ""
    assert "default-src 'none'" in policy


def test_the_language_is_stated(page: Page) -> None:
    assert page.all("html") == [{"lang": "en"}]


def test_identifiers_are_unique(page: Page) -> None:
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_all_states_are_told_apart(typical: Path) -> None:
    text = Page(typical.read_text()).text
    for words in ("Leaks", "Inconclusive", "Protected", "Not applicable", "Failed to run"):
        assert words in text
    assert "out of memory: 9.1 GiB were asked for" in text
    assert "the objective at the truth is 0.31" in text
    assert "gradleak audit --data digits" in text


def test_stages_and_batch_sizes_are_compared_when_there_are_several(broad: Path) -> None:
    ids = [a.get("id") for a in Page(broad.read_text()).all("section")]
    assert {"stage", "batch-size"} <= set(ids)


def test_rendering_is_a_pure_function_of_the_files(typical: Path) -> None:
    first = typical.read_bytes()
    assert render(typical.parent).read_bytes() == first
    assert not list(typical.parent.glob("*.partial"))


def written(directory: Path, *cases: Case, **changes: Any) -> tuple[dict[str, Any], Path]:
    synthetic.write(directory, cases, targets=2, **changes)
    return dict(jsonsafe.loads((directory / "result.json").read_text())), directory


def rendered(result: dict[str, Any], directory: Path) -> Page:
    (directory / "result.json").write_text(jsonsafe.dumps(result))
    return Page(render(directory).read_text())


def test_no_finding_at_all(tmp_path: Path) -> None:
    result, out = written(tmp_path / "out")
    page = rendered(result, out)
    assert "Nothing could be measured" in page.headings[0][1]


def test_only_failures(tmp_path: Path) -> None:
    cases = [Case("none", a, 0, state="error", reason=f"{a} broke") for a in ("dlg", "idlg")]
    page = rendered(*written(tmp_path / "out", *cases))
    assert "idlg broke" in page.text
    assert not page.all("img")


def test_not_run_and_inconclusive_states(tmp_path: Path) -> None:
    result, out = written(tmp_path / "out", Case("none", "dlg", 0.1), Case("clip", "dlg", 0.1))
    result["findings"][0]["state"] = "inconclusive"
    result["findings"][0]["verdict"] = None
    result["findings"][1] |= {"state": "not_run", "reason": "interrupted", "verdict": None}
    page = rendered(result, out)
    assert "Not run" in page.text
    assert "interrupted" in page.text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_numbers_that_are_not_finite(tmp_path: Path, value: float | None) -> None:
    result, out = written(tmp_path / "out", Case("none", "dlg", 0.1))
    finding = result["findings"][0]
    for measurement in finding["measurements"].values():
        for key in ("value", "low", "high", "baseline", "control"):
            measurement[key] = value
    for target in finding["targets"]:
        target["scores"] = {name: [value] for name in target["scores"]}
        target["control"] = None
        target["objective"] = value
    text = rendered(result, out).text
    assert "nan" not in re.findall(r"\w+", text)
    assert "inf" not in re.findall(r"\w+", text)


def test_a_minimal_finding_of_the_documented_interface(tmp_path: Path) -> None:
    result, out = written(tmp_path / "out", Case("none", "dlg", 0.1))
    finding = result["findings"][0]
    for key in (*NEWER, "warnings", "reason", "cost", "missed"):
        del finding[key]
    finding["trials"] = {"run": 2, "solved": 1, "diverged": 1, "failed": 0}
    for key in ("headline", "not_tested", "command", "fail_on"):
        del result[key]
    page = rendered(result, out)
    assert page.headings[0][1] == "The server recovers 1 of 2 images (no protection)"
    assert "No pictures: none were stored" in page.text


def test_damaged_tensors_cost_the_pictures_and_nothing_else(tmp_path: Path) -> None:
    result, out = written(tmp_path / "out", Case("none", "dlg", 0.1))
    for file in (out / "tensors").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    page = rendered(result, out)
    assert "is missing or damaged" in page.text
    assert not page.all("img")


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    hostile = '<script>alert(1)</script><img src=x onerror="x">'
    case = Case(hostile.replace(":", ""), "dlg", 0.1, warnings=(hostile,))
    result, out = written(tmp_path / "out", dataclasses.replace(case, defense="none"))
    result |= {"headline": hostile, "command": hostile, "not_tested": [hostile]}
    result["findings"][0] |= {"id": hostile, "attack": hostile, "defense_spec": hostile}
    page = rendered(result, out)
    assert not page.all("script")
    assert all("onerror" not in image for image in page.all("img"))
    assert hostile in page.text


def test_many_targets_are_cut_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "ROWS", 3)
    monkeypatch.setattr(view, "STRIPS", 2)
    synthetic.write(tmp_path / "out", [Case("none", "dlg", 0.3)], targets=5)
    page = Page(render(tmp_path / "out").read_text())
    assert "The 3 highest of 5 targets" in page.text
    assert sum(image.get("class") == "thumb" for image in page.all("img")) == 2


def test_an_error_keeps_a_protection_from_being_certified(tmp_path: Path) -> None:
    """Planted: a protected finding beside an attack that failed to run is no verdict of safety."""
    noise = "gaussian-noise:std=1"
    cases = [
        Case("none", "dlg", 0.1),
        Case(noise, "dlg", math.inf),
        Case(noise, "inverting-gradients", 0, state="error", reason="broke"),
    ]
    result = synthetic.write(tmp_path / "out", cases, targets=8)
    assert [f["verdict"] for f in result["findings"]] == ["leaks", "protected", "inconclusive"]
    report = view.Report(result, tmp_path / "out")
    assert [p.verdict for p in report.protections] == ["leaks", "inconclusive"]
    assert "this protection stays open" in report.protections[1].reason


def test_the_reason_rests_on_the_strongest_attack(tmp_path: Path) -> None:
    cases = [Case("none", "inverting-gradients", 1.0), Case("none", "dlg", 0.1)]
    result = synthetic.write(tmp_path / "out", cases, targets=3)
    protection = view.Report(result, tmp_path / "out").protections[0]
    assert protection.strongest is not None
    assert protection.strongest.attack == "dlg"


def test_the_opening_picture_matches_the_headline(tmp_path: Path) -> None:
    """A protection that leaks more than no protection does not take the place at the top."""
    cases = [Case("none", "dlg", 0.3), Case("clip:norm=1", "dlg", 0.05)]
    result = synthetic.write(tmp_path / "out", cases, targets=3)
    hero = view.Report(result, tmp_path / "out").hero
    assert hero is not None
    assert hero[0].raw["defense"] == "none"
    assert hero[1].role == "Median"


def test_fates_sum_to_the_targets_run(typical: Path) -> None:
    result = jsonsafe.loads((typical.parent / "result.json").read_text())
    for finding in view.Report(result, typical.parent).measured:
        assert sum(count for _, _, count in finding.fates) == finding.trials["run"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, InvalidInput, "expected the directory given to --out"),
        (b"", CorruptFile, "not valid JSON"),
        (b'{"schema_version": 1, "find', CorruptFile, "not valid JSON"),
        (b"\x80\x04\x95", CorruptFile, "not valid JSON"),
        (b"[" * 100_000, CorruptFile, "not valid JSON"),
        (b'{"seconds": NaN}', CorruptFile, "not valid JSON"),
        (b"[]", CorruptFile, "expected an object"),
    ],
)
def test_a_bad_directory_gives_one_line(
    tmp_path: Path, content: bytes | None, error: type[Exception], words: str
) -> None:
    if content is not None:
        (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(error) as caught:
        render(tmp_path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_report_that_cannot_be_written_gives_one_line(tmp_path: Path) -> None:
    _, out = written(tmp_path / "out", Case("none", "dlg", 0.1))
    (out / "report.html").mkdir()
    with pytest.raises(InvalidInput, match="cannot write"):
        render(out)


def test_conditions_are_told_with_their_outcome(tmp_path: Path) -> None:
    result, out = written(tmp_path / "out", Case("none", "dlg", 0.1))
    result["fail_on"] = [
        {"condition": "psnr_db>20", "holds": True, "findings": ["a", "b"]},
        {"condition": "clip:ssim>0.9", "holds": False, "findings": []},
    ]
    text = rendered(result, out).text
    assert "The condition psnr_db>20 of --fail-on holds for 2 findings." in text
    assert "The condition clip:ssim>0.9 of --fail-on does not hold." in text


def test_settings_may_be_stored_flat(tmp_path: Path) -> None:
    result, out = written(tmp_path / "out", Case("none", "dlg", 0.1))
    result["settings"] = {"seed": 3, "knows": ["labels"], "quiet": True, "budget": {"steps": 2}}
    text = Page(compose(result, out)).text
    assert "steps 2" in text
    assert json.dumps(result["settings"])  # unchanged by rendering
