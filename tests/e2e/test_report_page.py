"""The report in a real browser: no request, no overflow on a phone, contrast in both schemes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradleak.report import costs
from gradleak.report.html import render
from tests.report import synthetic

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

COLOURS = """() => {
  const parse = (c) => {
    const n = c.match(/[\\d.]+/g).map(Number);
    return n.length === 4 ? n : [...n, 1];
  };
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const luminance = (c) => c.slice(0, 3)
    .map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
      layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const visible = (e) => e.getClientRects().length && getComputedStyle(e).visibility === "visible";
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!visible(e)) continue;
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const style = getComputedStyle(e);
    const behind = ground(e);
    if (own) {
      const colour = e.namespaceURI.endsWith("svg") ? style.fill : style.color;
      const name = e.getAttribute("class") ?? e.tagName;
      found.push(["text", name, ratio(over(parse(colour), behind), behind)]);
    }
    if (e.matches("path.line, path.whisker, circle.dot, rect.part, .legend i")) {
      const drawn = e.matches("i") ? style.backgroundColor : style.stroke;
      const filled = e.matches("circle, rect") ? style.fill : drawn;
      const around = ground(e.parentElement);
      found.push(["graphic", e.getAttribute("class"), ratio(over(parse(filled), around), around)]);
    }
  }
  return found;
}"""

OUTSIDE = """() => [...document.querySelectorAll("body *")]
  .filter((e) => !e.closest(".scroll > *") && !e.closest(".skip") && e.getClientRects().length)
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5)
  .map((e) => `${e.tagName}.${e.getAttribute("class")}`)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium on this machine: the report is not checked in a browser")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module", params=["typical", "broad"])
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param) / "out"
    if request.param == "typical":
        synthetic.write(
            directory,
            (*synthetic.TYPICAL, synthetic.Case("clip:norm=1", "dlg", 2.0, adaptive=False)),
            fail_on=[{"condition": "psnr_db>20", "holds": True}],
        )
        prices = {"none": 0.92, "clip:norm=1": 0.9, "gaussian-noise:std=1": 0.5}
        places = [directory.parent / str(n) for n in range(len(prices))]
        trained = map(synthetic.trained, places, prices, prices.values())
        costs.keep(directory, list(trained))
    else:
        synthetic.write(directory, synthetic.MANY, channels=3, targets=3)
    return render(directory)


@pytest.fixture
def open_page(browser: Any, report: Path) -> Iterator[Any]:
    contexts = []

    def opened(*, width: int = 1280, scheme: str = "light", unfold: bool = True) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(report.as_uri())
        if unfold:
            page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
        return page

    yield opened
    for context in contexts:
        context.close()


def test_nothing_is_requested_and_nothing_complains(open_page: Any, report: Path) -> None:
    page = open_page()
    page.wait_for_load_state("networkidle")
    assert {u for u in page.asked if not u.startswith("data:")} == {report.as_uri()}
    assert page.said == []


def test_every_picture_is_drawn(open_page: Any) -> None:
    page = open_page()
    page.evaluate(
        "Promise.all([...document.images].map((i) => { i.loading = 'eager'; return i.decode(); }))"
    )
    assert page.evaluate("[...document.images].every((i) => i.naturalWidth > 0)")


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("unfold", [False, True])
def test_the_page_never_scrolls_sideways(open_page: Any, width: int, unfold: bool) -> None:
    page = open_page(width=width, unfold=unfold)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OUTSIDE) == []


def test_the_wide_table_scrolls_in_its_own_box(open_page: Any) -> None:
    page = open_page(width=360)
    box = page.locator("#numbers .scroll")
    assert box.evaluate("(e) => e.scrollWidth > e.clientWidth")
    assert box.get_attribute("tabindex") == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_meets_wcag_aa(open_page: Any, scheme: str) -> None:
    """Text at 4.5 (also large text), lines and bars at 3 against what lies behind them."""
    found = open_page(scheme=scheme).evaluate(COLOURS)
    kinds = {kind for kind, _, _ in found}
    assert kinds == {"text", "graphic"}
    least = {"text": 4.5, "graphic": 3.0}
    poor = {(kind, name, round(ratio, 2)) for kind, name, ratio in found if ratio < least[kind]}
    assert poor == set()


def test_the_contrast_check_is_not_vacuous(open_page: Any) -> None:
    page = open_page()
    page.evaluate("document.querySelector('h1').style.color = '#999'")
    assert min(ratio for kind, _, ratio in page.evaluate(COLOURS) if kind == "text") < 4.5


def test_the_schemes_differ(open_page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = open_page(scheme="light").evaluate(ground)
    assert light != open_page(scheme="dark").evaluate(ground)


def test_print_is_light_and_fits_the_paper(open_page: Any) -> None:
    page = open_page(width=720, scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 720


def test_contents_and_folds_work_from_the_keyboard(open_page: Any) -> None:
    page = open_page(unfold=False)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#main"
    summary = page.locator("#details summary").first
    summary.focus()
    page.keyboard.press("Enter")
    assert page.locator("#details details").first.evaluate("(d) => d.open")
