"""Draw docs/assets/compression.svg from what benchmarks/compression.py wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean

ROWS = (
    ("none", "none", 1),
    ("top-k 10 %", "top-k:fraction=0.1", 1),
    ("top-k 1 %", "top-k:fraction=0.01", 1),
    ("DGC 1 %, one round", "dgc:fraction=0.01,warm_up=0", 1),
    ("DGC 1 %, 4 rounds", "dgc:fraction=0.01,warm_up=0", 4),
    ("sign", "sign", 1),
    ("QSGD 16 levels, maximum", "quantize:levels=16,norm=max", 1),
    ("QSGD 16 levels, L2", "quantize:levels=16", 1),
    ("OUTPOST, first round", "outpost", 1),
    ("OUTPOST, 20 rounds", "outpost", 20),
    ("CENSOR", "censor", 1),
    ("CENSOR, first round alone, 2 rounds", "censor:rounds=1", 2),
    ("first layer frozen", "partial-sharing:withheld=first:1,frozen=true", 1),
)
LEFT, SCALE, STEP, TOP = 250, 15, 22, 40


def main(source: Path, target: Path) -> None:
    """An arrow a row, from the unaware attacker to the one who knows the protection."""
    found = {row["row"]: row for row in json.loads(source.read_text())}
    height, width = TOP + STEP * len(ROWS) + 34, LEFT + SCALE * 26 + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12" fill="#1c2430">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<circle cx="{LEFT}" cy="16" r="4" fill="#8a94a3"/>',
        f'<text x="{LEFT + 10}" y="20">unaware</text>',
        f'<circle cx="{LEFT + 90}" cy="16" r="4" fill="#b4531f"/>',
        f'<text x="{LEFT + 100}" y="20">knows the protection</text>',
    ]
    for tick in range(0, 26, 5):
        x, bottom = LEFT + SCALE * tick, TOP + STEP * len(ROWS) - 10
        parts.append(f'<path d="M{x} {TOP - 12}V{bottom}" stroke="#dde3ea"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{width - 16}" y="{height - 6}" text-anchor="end">PSNR, dB</text>')
    for place, (title, defense, rounds) in enumerate(ROWS):
        row = found[f"mnist-5k|{defense}|inverting-gradients:steps=400|{rounds}"]
        y = TOP + STEP * place
        knows = LEFT + SCALE * mean(row["adaptive"]["psnr"])
        parts.append(f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{title}</text>')
        if "unaware" in row:
            blind = LEFT + SCALE * mean(row["unaware"]["psnr"])
            parts.append(f'<path d="M{blind:.1f} {y}H{knows:.1f}" stroke="#b4531f"/>')
            parts.append(f'<circle cx="{blind:.1f}" cy="{y}" r="4" fill="#8a94a3"/>')
        parts.append(f'<circle cx="{knows:.1f}" cy="{y}" r="4" fill="#b4531f"/>')
    target.write_text("\n".join([*parts, "</svg>"]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).with_name("compression.svg"))
