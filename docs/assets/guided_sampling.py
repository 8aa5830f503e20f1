"""Measure docs/diffusion-priors.md: a diffusion prior against others under Gaussian noise.

    python docs/assets/guided_sampling.py PRIOR COUNT RESULT.json [FIRST]

Needs Fashion-MNIST in $GRADLEAK_DATA. Targets are clients' examples FIRST (2000) and on; the
attacks' settings were chosen on examples 3600 to 3603.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image

import gradleak as gl
from gradleak import attacks, data, defenses, priors
from gradleak.metrics.statistics import clustered_mean, clustered_rate, paired_difference
from gradleak.run.trial import divide
from gradleak.types import Batch, Fact, ModelState

NETWORK, DEFENSE = "lenet", "gaussian-noise:std=0.1"
GUIDED = "guided-sampling:steps=100,restarts=8,rate=0.2"
MOST = (("", "guess"), ("diffusion", GUIDED), ("gaussian", "posterior:steps=1200,restarts=1"))
"""(prior, attack) on all targets."""
FEW = (
    ("mixture", "posterior:steps=1200,restarts=1"),
    ("", "inverting-gradients:steps=600,restarts=1"),
    ("", "bayes:steps=600,restarts=1"),
)
"""The same, on the first 10 targets only."""
CHUNK, BANK = 10, 100
GRANTED = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, Fact.LABELS, Fact.PRIOR})


def main(file: Path, count: int, result: Path, first: int) -> None:
    """Write every target's PSNR, control and identification, and print the means so far."""
    torch.set_num_threads(1)
    fashion = data.load("fashion-mnist")
    halves = divide(fashion, 0)
    public = fashion.batch(halves.public[:6000])
    known = {p: priors.fit(p, public, fashion.spec, seed=0) for p in ("gaussian", "mixture")}
    known["diffusion"] = priors.load(file)
    state = ModelState.of(gl.models.build(NETWORK, fashion.spec, seed=0))
    bank = fashion.batch(halves.clients[first : first + BANK]).inputs.double()
    rows: dict[str, dict[str, list[float]]] = {}
    strips: dict[str, list[Batch]] = {}
    for begin, jobs in [*((b, MOST) for b in range(0, count, CHUNK)), (0, FEW)]:
        chosen = halves.clients[first + begin : first + min(begin + CHUNK, count)]
        guess = known["gaussian"]
        for name, spec in jobs:
            seen, truths = [], []
            for i, index in enumerate(chosen):
                scenario = gl.Scenario(
                    fashion,
                    state,
                    defenses.build(DEFENSE)(gl.FedSGD()),
                    gl.ThreatModel(GRANTED if name else GRANTED - {Fact.PRIOR}),
                    indices=index[None],
                    prior=known[name] if name else None,
                )
                draw = torch.Generator().manual_seed(begin + i)
                observation, truth = gl.simulate(scenario, generator=draw)
                seen.append(observation)
                truths.append(truth.batch)
            before = time.process_time()
            if spec == "guess":
                claims = [Batch(guess.mean(t.labels).to(t.inputs), t.labels) for t in truths]
            else:
                claims = [c.batch for c in attacks.attack_all(attacks.build(spec), seen, seed=0)]
            spent = (time.process_time() - before) / len(claims)
            row = rows.setdefault(
                f"{spec} {name}".strip(), {k: [] for k in ("psnr", "control", "found", "seconds")}
            )
            pairs = list(zip(claims, truths, strict=True))
            others = [*truths[1:], truths[0]]
            row["psnr"] += [gl.metrics.psnr_db(c, t) for c, t in pairs]
            row["control"] += [gl.metrics.psnr_db(c, o) for c, o in zip(claims, others)]
            row["found"] += [
                float(gl.metrics.identified(c.inputs.double(), t.inputs.double(), bank)[0])
                for c, t in pairs
            ]
            row["seconds"] += [spent] * len(claims)
            if not begin:
                strips.setdefault("truth", truths)
                strips[f"{spec} {name}"] = claims
        result.write_text(json.dumps(rows, indent=1) + "\n")
        report(rows)
    draw_strips(list(strips.values()), result.with_suffix(".png"))


def report(rows: dict[str, dict[str, list[float]]]) -> None:
    """Means with 95 % intervals, and what the guided samples gain in pairs."""
    best = next(r for name, r in rows.items() if name.startswith("guided"))["psnr"]
    for name, row in rows.items():
        own = [[v] for v in row["psnr"]]
        print(
            f"{name}: n={len(own)} {clustered_mean(own)} control "
            f"{clustered_mean([[v] for v in row['control']])} identified "
            f"{clustered_rate([[bool(v)] for v in row['found']])} "
            f"{sum(row['seconds']) / len(own):.1f} CPU s; guided gains "
            f"{paired_difference([[v] for v in best[: len(own)]], own)}",
            flush=True,
        )


def draw_strips(rows: list[list[Batch]], path: Path) -> None:
    """A row of pictures for the truth and for every attack."""
    strips = [torch.cat([b.inputs[0, 0].float() for b in row], -1) for row in rows]
    levels = (torch.cat(strips, -2).clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(levels.numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        Path(sys.argv[3]),
        int(sys.argv[4]) if sys.argv[4:] else 2000,
    )
