"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from gradleak.report.findings import as_given
from gradleak.report.wording import attack

if TYPE_CHECKING:
    from gradleak.auditing import LeakageReport
    from gradleak.reproductions.running import Reproduced
    from gradleak.run.recorded import Claim

_WIDTH = 120
"""Columns where stdout is no terminal."""


def console() -> Console:
    """A console on stdout that is wide enough where nobody looks."""
    seen = Console()
    return seen if seen.is_terminal else Console(width=_WIDTH)


def print_report(report: LeakageReport) -> None:
    """Print one row per finding, the headline and where the report lies."""
    table = Table(box=None, pad_edge=False)
    several = len({_setting(f) for f in report.findings}) > 1
    for title in (["setting"] if several else []) + ["protection", "attack"]:
        table.add_column(title, no_wrap=True)
    for title in ("PSNR dB", "guess", "control", "identified", "solved"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for finding in report.findings:
        row = [as_given(finding), attack(finding), *_numbers(finding), _verdict(finding)]
        table.add_row(*([_setting(finding)] if several else []), *row)
    out = console()
    out.print(table)
    out.print()
    if any(x["proved"] for f in report.findings for x in f.get("limits", ())):
        out.print("(≤ …): proved, whatever the attack", highlight=False)
    out.print(report.headline, soft_wrap=True, highlight=False, markup=False)
    out.print(f"Report: {report.page}", soft_wrap=True, highlight=False, markup=False)


def print_training(training: Mapping[str, Any], directory: Path) -> None:
    """Print what a federated training reached, and what a round of it cost."""
    rounds = training["rounds"]

    def mean(name: str) -> float:
        return sum(float(r[name]) for r in rounds) / len(rounds)

    told = {name for r in rounds for name, value in r.items() if value is not None}

    table = Table(box=None, pad_edge=False, show_header=False)
    settings = training["settings"]
    table.add_row("training", f"{settings['data']}, {settings['model']}, {settings['mechanism']}")
    table.add_row("protection", settings["defense"])
    table.add_row("aggregation", settings.get("aggregation", "none"))
    table.add_row("clients", f"{settings['clients']}, {settings['partition']}")
    if training["accuracy"] is None:
        loss, examples = training["test_loss"], training["test_examples"]
        table.add_row("denoising loss", f"{loss:.4g} on {examples} examples")
        if (quality := training["sample_quality"]) is not None:
            apart = f"{quality['frechet']:.3g} from {quality['samples']} samples to public images"
            table.add_row("Fréchet distance", f"{apart}, {quality['floor']:.2g} among those")
    else:
        examples = training["test_examples"]
        table.add_row("accuracy", f"{training['accuracy']:.2%} of {examples} examples")
    table.add_row("rounds", str(len(rounds)))
    for name in ("seconds", "client_seconds", "server_seconds", "aggregation_seconds"):
        if name in told:
            unit = "s" if name == "seconds" else "s CPU"
            table.add_row(f"{name.replace('_', ' ')} per round", f"{mean(name):.3g} {unit}")
    for name in ("bytes_up", "bytes_down"):
        table.add_row(f"{name.replace('_', ' ')} per round", f"{mean(name):.0f}")
    failed = sum(len(r["failed"]) for r in rounds)
    table.add_row("updates of no use", f"{failed} of {sum(r['clients'] for r in rounds)}")
    out = console()
    out.print(table)
    out.print(f"Written to: {directory}", soft_wrap=True, highlight=False, markup=False)


def print_claim(claim: Claim) -> None:
    """Print what an attack on a recorded update says of itself."""
    found = claim.reconstruction
    out = console()
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("attack", claim.attack)
    table.add_row("status", found.status + (f": {found.message}" if found.message else ""))
    table.add_row("objective", f"{found.objective:.6g}")
    table.add_row("gradient evaluations", str(found.evaluations))
    table.add_row("labels", ", ".join(map(str, found.batch.classes.tolist())))
    table.add_row("written to", str(claim.directory))
    out.print(table)


def print_reproduced(outcome: Reproduced) -> None:
    """Print one line per row, and where the report lies."""
    table = Table(box=None, pad_edge=False)
    table.add_column("row", overflow="fold")
    for title in ("paper", "ours", "n"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for row in outcome.result["rows"]:
        ours = row["ours"]
        measured = f"{_decimal(ours['value'])} [{_decimal(ours['low'])}, {_decimal(ours['high'])}]"
        table.add_row(
            row["row"],
            _decimal(row["paper"]),
            f"{measured} {row['unit']}" if ours["n"] else "–",
            str(ours["n"]),
            row["note"],
        )
    out = console()
    out.print(table)
    out.print(f"Report: {outcome.page}", soft_wrap=True, highlight=False, markup=False)


def _setting(finding: Mapping[str, Any]) -> str:
    scenario = finding["scenario"]
    return f"{scenario['stage']}, {scenario['mechanism']}, batch {scenario['batch_size']}"


def _numbers(finding: Mapping[str, Any]) -> list[str]:
    measured = finding["measurements"]
    psnr, identified = measured.get("psnr_db"), measured.get("identified")
    if not psnr or not identified:
        return ["–"] * 5
    trials = finding["trials"]
    proved = [f"(≤ {x['limit']:.0%})" for x in finding.get("limits", ()) if x["proved"]]
    return [
        f"{_decimal(psnr['value'])} [{_decimal(psnr['low'])}, {_decimal(psnr['high'])}]",
        _decimal(psnr["baseline"]),
        _decimal(psnr["control"]),
        " ".join([f"{identified['value']:.0%}", *proved]),
        f"{trials['solved']}/{trials['run']}",
    ]


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _verdict(finding: Mapping[str, Any]) -> str:
    if finding.get("violations"):
        return "ERROR"
    if finding["state"] == "measured":
        return str(finding["verdict"])
    if finding["state"] == "unscored":
        return "unscored"
    return f"{finding['state'].replace('_', ' ')}: {finding['reason']}"
