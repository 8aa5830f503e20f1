"""Draw docs/assets/instahide.png: private images, what the server gets, what many rounds give.

The whole chain: a client of six digits trains on one of them in every round, under InstaHide; the
server inverts every gradient (`linear-layer`, exact here) and decodes the encodings.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

import gradleak as gl
from gradleak import metrics
from gradleak.attacks.decoding import decode
from gradleak.defenses import InstaHide
from gradleak.types import Batch, ModelState

COUNT, ROUNDS, SCALE, GAP = 6, 12, 3, 6


def main(target: Path) -> None:
    """Rows: private, an encoding of each as inverted, decoded; scores are printed."""
    digits = gl.data.load("mnist-5k")
    division = gl.data.split(digits, 0)
    public = digits.batch(division.public[:2000])
    rule = InstaHide().informed(public)
    state = ModelState.of(gl.models.build("mlp", digits.spec, seed=0))
    claims = []
    for turn in range(ROUNDS):
        for i in range(COUNT):
            scenario = gl.Scenario(
                digits, state, rule(gl.FedSGD()), indices=division.clients[i : i + 1]
            )
            seen, truth = gl.simulate(
                scenario, generator=torch.Generator().manual_seed(turn * COUNT + i)
            )
            claims += gl.attack_all(gl.attacks.build("linear-layer"), [seen], seed=0)
            exact = metrics.psnr_db(claims[-1].batch, truth.trained_on)
            if exact < 60:
                print(f"round {turn}, image {i}: encoding at {exact:.1f} dB")
    encodings = Batch(
        torch.cat([c.batch.inputs for c in claims]), torch.cat([c.batch.labels for c in claims])
    )
    private = digits.batch(division.clients[:COUNT])
    bank = digits.batch(division.clients[:1000]).inputs
    found = decode(
        encodings,
        rule=rule,
        state=state,
        count=COUNT,
        batch_size=1,
        public=public.inputs,
        generator=torch.Generator().manual_seed(0),
    )
    decoded = Batch(found.images, private.labels)
    order = metrics.align(decoded, private)
    rows = (private.inputs, encodings.inputs[:COUNT], found.images[order])
    for name, row in zip(("encoding", "decoded"), rows[1:], strict=True):
        scored = metrics.score(Batch(row, private.labels), private, bank=bank, spec=digits.spec)
        decibels = torch.tensor(scored["psnr_db"])
        half = 1.96 * decibels.std() / COUNT**0.5
        print(f"{name}: {decibels.mean():.1f} ± {half:.1f} dB, identified {scored['identified']}")
    side = 28 * SCALE + GAP
    page = Image.new("L", (COUNT * side + GAP, len(rows) * side + GAP), 255)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            pixels = (picture[0].clamp(0, 1) * 255).round().byte().numpy()
            tile = Image.fromarray(pixels).resize((28 * SCALE,) * 2, Image.Resampling.NEAREST)
            page.paste(tile, (GAP + x * side, GAP + y * side))
    page.save(target)


if __name__ == "__main__":
    main(Path(__file__).with_name("instahide.png"))
