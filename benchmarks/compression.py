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
from gradleak.defenses import Memory, advanced, build, difference, norm, undefended
from gradleak.mechanisms import FedSGD
from gradleak.seeding import child, target_generator
from gradleak.types import Batch, Exchange, Knowledge, Mechanism, ModelState, Observation

TARGETS, BANK = 8, 100
IG = "inverting-gradients:steps=400"
SAME = ("none", "quantize")
"""Protections whose aware and unaware searches are one: the mean is the update itself."""


@dataclass(frozen=True)
class Row:
    """One protection and one attack; `rounds` are of one batch.

    The weights stay, or move by `drift` times each round's update against it.
    """

    part: str
    data: str
    defense: str
    attack: str = IG
    rounds: int = 1
    unaware: bool = True
    drift: float = 0.0

    @property
    def name(self) -> str:
        moves = f"|drift {self.drift:g}" if self.drift else ""
        return f"{self.data}|{self.defense}|{self.attack}|{self.rounds}{moves}"


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
        Row("drift", "mnist-5k", "dgc:fraction=0.01,warm_up=0", rounds=4, unaware=False, drift=d)
        for d in (0.1, 0.001)
    ),
    *(
        Row("rog", "cifar10", defense, attack, unaware=False)
        for defense in OBFUSCATED
        for attack in ("rog", "rog:steps=400,factor=2", "rog:steps=400,factor=1", IG)
    ),
]


def pool(name: str) -> tuple[Dataset, Tensor]:
    """The data and whom the targets and the bank are drawn from."""
    known = data.load(name)
    clients = torch.arange(2000, 3000) if name == "cifar10" else data.split(known, 0).clients
    return known, clients


def observed(
    client: Mechanism, state: ModelState, batch: Batch, row: Row, stream: torch.Generator
) -> tuple[Exchange, ...]:
    """Rounds of a client that remembers."""
    memory: Memory = {}
    seen = []
    for number in range(row.rounds):
        drawn = child(stream, f"client/{number}")
        update, memory = advanced(client, state, batch, memory, generator=drawn)
        seen.append(Exchange(state, update))
        if row.drift:
            moved = {k: p - row.drift * update.values[k] for k, p in state.params.items()}
            state = replace(state, params=moved)
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
            exchanges = observed(client, state, batch, row, drawn)
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


def told_apart(defense: str) -> dict[str, object]:
    """For how many targets the true example fits the update best of the bank, label known."""
    known, clients = pool("mnist-5k")
    state = ModelState.of(models.build("lenet", known.spec, seed=0))
    client, bank = build(defense)(FedSGD()), known.batch(clients[:BANK])
    hits, among = {"adaptive": 0, "unaware": 0}, 0
    for target in range(TARGETS):
        rivals = [i for i in range(BANK) if bank.labels[i] == bank.labels[target]]
        among += len(rivals)
        own = known.batch(clients[target : target + 1])
        sent = client.sample(state, own, generator=target_generator(7, target))
        for kind, believed in (("adaptive", client), ("unaware", undefended(client))):
            gaps = {}
            for i in rivals:
                claim = Batch(bank.inputs[i : i + 1], bank.labels[i : i + 1])
                found = believed.predict(sent, state, claim)
                gaps[i] = norm(difference(found, sent))
            hits[kind] += int(min(gaps, key=gaps.__getitem__) == target)
    return {"row": f"told apart|{defense}", **hits, "of": TARGETS, "by chance": TARGETS**2 / among}


def main(target: Path, part: str = "") -> None:
    rows = json.loads(target.read_text()) if target.exists() else []
    done = {row["row"] for row in rows}
    for row in ROWS:
        if row.name in done or (part and row.part != part):
            continue
        rows.append(measured(row))
        print(rows[-1], flush=True)
        target.write_text(json.dumps(rows, indent=1))
    for defense in ("censor", "censor:projection=published") if part in ("", "norms") else ():
        if f"told apart|{defense}" not in done:
            rows.append(told_apart(defense))
            print(rows[-1], flush=True)
    target.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
