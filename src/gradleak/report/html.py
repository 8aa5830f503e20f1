"""report.html: one self-contained page, a pure function of the files beside it.

The page opens with the finding, then a verdict for each protection, pictures chosen by rule, the
numbers with intervals, and what they do not show. It loads nothing and runs no script.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import jinja2

from gradleak import jsonsafe
from gradleak.errors import CorruptFile, InvalidInput
from gradleak.report import wording
from gradleak.report.schema import validate_result
from gradleak.report.view import Report
from gradleak.report.wording import Json


def render(directory: Path) -> Path:
    """Write report.html into `directory` from its result.json and tensors.

    Args:
        directory: what an audit wrote.

    Returns:
        Path of the report.

    Raises:
        InvalidInput: there is no result.json, or the report cannot be written.
        CorruptFile: result.json is not what an audit writes.
    """
    source = directory / "result.json"
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"no readable {source}: expected the directory given to --out of an audit"
        ) from error
    try:
        result = jsonsafe.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{source} is not valid JSON: {error}") from error
    validate_result(result, name=str(source))
    page = compose(result, directory, fingerprint=hashlib.sha256(content).hexdigest()[:16])
    return write_page(directory / "report.html", page)


def compose(result: Json, directory: Path, *, fingerprint: str = "") -> str:
    """Return the page for a validated `result` whose tensors lie in `directory`."""
    report = Report(result, directory)
    template = jinja_environment().get_template("report.html.jinja")
    return template.render(report=report, fingerprint=fingerprint, definitions=wording.DEFINITIONS)


def jinja_environment() -> jinja2.Environment:
    """Where the templates of pages are, and the filters that write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradleak.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": wording.number,
        "significant": wording.significant,
        "percent": wording.percent,
        "decibels": wording.decibels,
        "seconds": wording.seconds,
    }
    return environment


def write_page(target: Path, page: str) -> Path:
    """Write a page whole or not at all.

    Raises:
        InvalidInput: it cannot be written.
    """
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror}") from error
    return target
