"""Draw docs/assets/label-recovery.svg from the reproduction.json of `reproduce label-recovery`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

PANELS = (
    ("untrained, batch 8", "mnist, ReLU, batch 8, step 0"),
    ("100 steps, batch 8", "mnist, ReLU, batch 8, step 100"),
    ("untrained, batch 64", "mnist, ReLU, batch 64, step 0"),
    ("100 steps, batch 64", "mnist, ReLU, batch 64, step 100"),
)
LEFT, WIDTH, GAP, STEP, TOP = 130, 170, 26, 20, 44


def main(source: Path, target: Path) -> None:
    """Dots with whiskers, a panel per setting; the dashed line is the best guess."""
    rows = json.loads(source.read_text())["rows"]
    found = {row["row"]: row for row in rows if row["metric"] == "overlap"}
    rules = [name.rpartition(" / ")[2] for name in found if name.startswith(PANELS[0][1] + " /")]
    rules = [rule for rule in rules if rule != "guess"]
    height = TOP + STEP * len(rules) + 30
    width = LEFT + (WIDTH + GAP) * len(PANELS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#1c2430">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for place, rule in enumerate(rules):
        y = TOP + STEP * place + 4
        parts.append(f'<text x="{LEFT - 12}" y="{y}" text-anchor="end">{rule}</text>')
    for column, (title, table) in enumerate(PANELS):
        left = LEFT + (WIDTH + GAP) * column
        bottom = TOP + STEP * len(rules) - 8
        parts.append(f'<text x="{left}" y="18" font-weight="bold">{title}</text>')
        for tick in (0, 0.5, 1):
            x = left + WIDTH * tick
            parts.append(f'<path d="M{x:.0f} {TOP - 14}V{bottom}" stroke="#dde3ea"/>')
            parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
        guess = left + WIDTH * found[f"{table} / guess"]["ours"]["value"]
        parts.append(
            f'<path d="M{guess:.1f} {TOP - 14}V{bottom}" stroke="#b4531f" stroke-dasharray="4 3"/>'
        )
        for place, rule in enumerate(rules):
            row = found[f"{table} / {rule}"]
            y = TOP + STEP * place
            if "says nothing of 10 of 10" in row["note"]:
                parts.append(f'<text x="{left + 4}" y="{y + 4}" fill="#8a94a3">says nothing</text>')
                continue
            low, value, high = (
                left + WIDTH * min(1.0, max(0.0, row["ours"][k])) for k in ("low", "value", "high")
            )
            parts.append(f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="#2b5fa8" stroke-width="2"/>')
            parts.append(f'<circle cx="{value:.1f}" cy="{y}" r="4" fill="#2b5fa8"/>')
    target.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_name("label-recovery.svg"))
