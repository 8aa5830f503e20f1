"""Draw docs/assets/noise-against-slices.svg from noise-against-slices.json."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

LEFT, TOP, WIDTH, HEIGHT = 60, 50, 560, 300
LOST, PSNR, LINEAR = (-1.5, 100.0), (0.0, 35.0), 0.5
COLOURS = {"MNIST": "#2b5fa8", "Fashion-MNIST": "#b4531f"}


def across(lost: float) -> float:
    """Place of an accuracy lost, in percentage points: linear near zero, then logarithmic."""
    low, high, here = (math.asinh(v / LINEAR) for v in (*LOST, lost))
    return LEFT + WIDTH * (here - low) / (high - low)


def up(psnr: float) -> float:
    """Place of a PSNR in dB."""
    return TOP + HEIGHT * (1 - (psnr - PSNR[0]) / (PSNR[1] - PSNR[0]))


def main(source: Path, target: Path) -> None:
    """A dot per protection and network: mean over targets, with its 95 % t-interval."""
    data = json.loads(source.read_text())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 40} '
        f'{TOP + HEIGHT + 60}" font-family="sans-serif" font-size="12" fill="#1c2430">',
        f'<rect width="{LEFT + WIDTH + 40}" height="{TOP + HEIGHT + 60}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="18" font-weight="bold">PSNR in dB under an adaptive attack, '
        "untrained lenet (low and left is better)</text>",
    ]
    for place, (stage, colour) in enumerate(COLOURS.items()):
        x = LEFT + 8 + 110 * place
        parts.append(f'<circle cx="{x}" cy="34" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 10}" y="38">{stage}</text>')
    for tick in range(0, 36, 5):
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y:.0f}H{LEFT + WIDTH}" stroke="#dde3ea"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{tick}</text>')
    for lost in (-1, 0, 1, 10, 100):
        x = across(lost)
        parts.append(f'<path d="M{x:.0f} {TOP}V{TOP + HEIGHT}" stroke="#dde3ea"/>')
        parts.append(
            f'<text x="{x:.0f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{lost:g}</text>'
        )
    parts.append(
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 40}" text-anchor="middle">MNIST test '
        "accuracy lost after 500 rounds, percentage points</text>"
    )
    for name, row in data["protections"].items():
        x = across(100 * (data["accuracy undefended"] - row["accuracy"]))
        for place, (stage, colour) in enumerate(COLOURS.items()):
            values = row[stage]
            mean = statistics.mean(values)
            half = data["t"] * statistics.stdev(values) / math.sqrt(len(values))
            at = x + 8 * place - 4
            parts.append(
                f'<path d="M{at:.1f} {up(mean - half):.1f}V{up(mean + half):.1f}" '
                f'stroke="{colour}" stroke-width="2"/>'
            )
            parts.append(f'<circle cx="{at:.1f}" cy="{up(mean):.1f}" r="5" fill="{colour}"/>')
        top = min(up(statistics.mean(row[s])) for s in COLOURS)
        anchor = "end" if x > LEFT + 0.8 * WIDTH else "middle"
        parts.append(
            f'<text x="{x:.0f}" y="{top + row["label"]:.0f}" text-anchor="{anchor}">{name}</text>'
        )
    target.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    main(here / "noise-against-slices.json", here / "noise-against-slices.svg")
