"""Draw docs/assets/gradient-slices.svg from gradient-slices.json: PSNR of every target, in dB."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

COLOURS = {"unprotected": "#8a94a3", "unaware": "#b4531f", "adaptive": "#2b5fa8"}
LEFT, WIDTH, STEP, TOP, MOST = 250, 520, 20, 40, 60.0


def main(source: Path, target: Path) -> None:
    """A row per data set, attack and belief; a dot per target, a bar at the mean."""
    rows = [(k, json.loads(source.read_text())[k]) for k in json.loads(source.read_text())]
    lines = [(f"{name}, {who}", who, v) for name, row in rows for who, v in row.items()]
    height = TOP + STEP * len(lines) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 30} {height}" '
        'font-family="sans-serif" font-size="12" fill="#1c2430">',
        f'<rect width="{LEFT + WIDTH + 30}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="18" font-weight="bold">PSNR of every target, dB</text>',
    ]
    bottom = TOP + STEP * len(lines) - 6
    for tick in range(0, 61, 10):
        x = LEFT + WIDTH * tick / MOST
        parts.append(f'<path d="M{x:.0f} {TOP - 12}V{bottom}" stroke="#dde3ea"/>')
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    for place, (title, who, values) in enumerate(lines):
        y = TOP + STEP * place
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{title}</text>')
        for value in values:
            x = LEFT + WIDTH * min(value, MOST) / MOST
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="{COLOURS[who]}" fill-opacity="0.5"/>'
            )
        x = LEFT + WIDTH * statistics.mean(values) / MOST
        parts.append(
            f'<path d="M{x:.1f} {y - 8}V{y + 8}" stroke="{COLOURS[who]}" stroke-width="3"/>'
        )
    target.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    here = Path(__file__).parent
    main(here / "gradient-slices.json", here / "gradient-slices.svg")
