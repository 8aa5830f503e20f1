"""Measure docs/compression.md: every row unaware and adaptive, one CPU thread.

python benchmarks/compression.py OUT.json [PART] adds the rows that OUT.json lacks.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gradleak import attacks, data, metrics, models
from gradleak.data import Dataset
from gradleak.defenses import advanced, build, undefended
from gradleak.mechanisms import FedSGD
from gradleak.seeding import child, target_generator
from gradleak.types import Batch, Exchange, Knowledge, Mechanism, ModelState, Observation

TARGETS, BANK = 8, 100
IG = "inverting-gradients:steps=400"
SAME = ("none", "quantize")
"""Protections whose aware and unaware searches are one: the mean is the update itself."""


@dataclass(frozen=True)
class Row:
    """One protection and one attack; `rounds` are of one batch and weights that stay."""

    part: str
    data: str
    defense: str
    attack: str = IG
    rounds: int = 1
    unaware: bool = True

    @property
    def name(self) -> str:
        return f"{self.data}|{self.defense}|{self.attack}|{self.rounds}"


MNIST = [
    ("none", 1), ("top-k:fraction=0.1", 1), ("top-k:fraction=0.01", 1), ("sign", 1),
    ("dgc:fraction=0.01,warm_up=0", 1), ("dgc:fraction=0.01,warm_up=0", 4),
    ("dgc:fraction=0.01,warm_up=0", 16), ("dgc", 1), ("outpost", 1), ("outpost", 20),
    ("quantize:levels=16", 1), ("quantize:levels=16,norm=max", 1), ("quantize:levels=1", 1),
    ("censor", 1), ("censor:projection=published", 1), ("censor:rounds=1", 2),
    ("partial-sharing:withheld=first:1,frozen=true", 1),
    ("dgc:fraction=0.001,warm_up=0", 1), ("dgc:fraction=0.001,warm_up=0", 16),
]  # fmt: skip
OBFUSCATED = [
    "none", "quantize:levels=16,norm=max", "top-k:fraction=0.1", "sign",
    "gaussian-noise:std=0.01",
]  # fmt: skip
ROWS = [
    *(
        Row("mnist", "mnist-5k", d, rounds=n, unaware=n == 1 and not d.startswith(SAME))
        for d, n in MNIST
    ),
    *(
        Row("posterior", "mnist-5k", defense, "posterior:steps=400,restarts=1", unaware=False)
        for defense in ("quantize:levels=16", "quantize:levels=1")
    ),
    *(
        Row("rog", "cifar10", defense, attack, unaware=False)
        for defense in OBFUSCATED
        for attack in ("rog", "rog:steps=400,factor=2", IG)
    ),
]


def pool(name: str) -> tuple[Dataset, Tensor]:
    """The data and whom the targets and the bank are drawn from."""
    known = data.load(name)
    clients = torch.arange(2000, 3000) if name == "cifar10" else data.split(known, 0).clients
    return known, clients


def observed(
    client: Mechanism, state: ModelState, batch: Batch, rounds: int, stream: torch.Generator
) -> tuple[Exchange, ...]:
    """Rounds of a client that remembers."""
    memory, seen = {}, []
    for number in range(rounds):
        drawn = child(stream, f"client/{number}")
        update, memory = advanced(client, state, batch, memory, generator=drawn)
        seen.append(Exchange(state, update))
    return tuple(seen)


def measured(row: Row) -> dict[str, object]:
    known, clients = pool(row.data)
    state = ModelState.of(models.build("lenet", known.spec, seed=0))
    client = build(row.defense)(FedSGD())
    bank = known.batch(clients[:BANK])
    truths, seen = [], []
    with torch.no_grad():
        for target in range(TARGETS):
            batch = known.batch(clients[target : target + 1])
            drawn = target_generator(7, target)
            exchanges = observed(client, state, batch, row.rounds, drawn)
            truths.append(batch)
            knowledge = Knowledge(1, batch.labels)
            seen.append(Observation(exchanges, client, known.spec, knowledge))
    found: dict[str, object] = {"row": row.name}
    for kind in ("adaptive", "unaware") if row.unaware else ("adaptive",):
        before = time.process_time()
        believed = seen
        if kind == "unaware":
            believed = [replace(o, mechanism=undefended(client)) for o in seen]
        claims = attacks.attack_all(attacks.build(row.attack), believed, seed=3)
        found[kind] = {
            "psnr": [metrics.psnr_db(c.batch, t) for c, t in zip(claims, truths, strict=True)],
            "identified": sum(
                int(metrics.identified(c.batch.inputs, t.inputs, bank.inputs).sum())
                for c, t in zip(claims, truths, strict=True)
            ),
            "seconds": time.process_time() - before,
        }
    return found


def main(target: Path, part: str = "") -> None:
    rows = json.loads(target.read_text()) if target.exists() else []
    done = {row["row"] for row in rows}
    for row in ROWS:
        if row.name in done or (part and row.part != part):
            continue
        rows.append(measured(row))
        print(rows[-1], flush=True)
        target.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
