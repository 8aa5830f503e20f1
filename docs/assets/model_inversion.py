"""Draw docs/assets/model-inversion.png: a picture of every class, line by line, as they came first.

gradleak reproduce diff-mi
python docs/assets/model_inversion.py gradleak-reproduce-diff-mi docs/assets/model-inversion.png
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from gradleak.reproductions.diff_mi import ATTACK, PIXELS, PRIVATE, SUREST, UNTRAINED

LINES = (PRIVATE, ATTACK, PIXELS, SUREST, "prior, told the class", UNTRAINED)
SCALE, GAP = 3, 6


def main(directory: Path, picture: Path) -> None:
    """One row per line, one block of columns per cell of the table."""
    records = [json.loads(row) for row in (directory / "trials.jsonl").read_text().splitlines()]
    blocks = []
    for record in records:
        if record["state"] != "measured":
            continue
        side = record["side"]
        strips = []
        for line in LINES:
            levels = bytearray(base64.b64decode(record["pictures"][line]))
            images = torch.frombuffer(levels, dtype=torch.uint8).reshape(-1, side, side)
            strips.append(torch.cat(list(images), 1))
        blocks += [torch.cat(strips), torch.full((side * len(LINES), GAP), 255, dtype=torch.uint8)]
    image = Image.fromarray(torch.cat(blocks[:-1], 1).numpy())
    image = image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST)
    image.save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
