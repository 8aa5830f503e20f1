"""Client and server CPU, bytes and steps of every aggregation protocol, and of Flower's SecAgg+.

    python benchmarks/aggregation.py --out aggregation.json                 # all cells; resumes
    python benchmarks/aggregation.py --quick
    python benchmarks/aggregation.py --protocols secagg,flower --clients 16 --dropouts 0,0.3
    python benchmarks/aggregation.py --against-flower --rounds 5            # ratios, interleaved

A cell is a protocol, a number of clients, a length and a share of clients lost right before they
would upload. Every cell is a whole round with real bytes in a process of its own, its sum checked;
all clients have one vector, of multiples of the encoding's step. A cell that would take more than
`--limit` CPU seconds is not played: a line through the two longest lengths played stands in for
it, `scaled_from` names them, and the table marks it with ~. Figures of clients are medians over
those that stayed; Flower's hold no serialisation (`flower_secagg.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradleak.crypto import Aborted, FixedPoint, Terms, aggregations, build, keys
from gradleak.crypto.encoding import Reals
from gradleak.crypto.protocol import SESSION
from gradleak.crypto.rehearsal import Cost, rehearse

ENCODING = FixedPoint(clip=8, fraction=18)
"""Flower's default clip and step."""

FLOWER = "flower"
FIRST = 250
MEMORY = 6 * 2**30
FIGURES = ("client_ms", "server_ms", "helper_ms", "bytes_up", "bytes_down", "peak_mib")
Cell = dict[str, Any]


class Vectors(Mapping[int, Reals]):
    """One vector for all, and the step at which it is first asked for."""

    def __init__(self, vector: Reals, clients: int) -> None:
        self._vector, self._clients = vector, clients
        self.step, self.asked = 0, -1

    def __getitem__(self, client: int) -> Reals:
        self.asked = self.step if self.asked < 0 else self.asked
        return self._vector

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._clients))

    def __len__(self) -> int:
        return self._clients

    def watch(self, step: int, receiver: int, raw: bytes) -> bytes:
        """Note the step of a request on its way."""
        self.step = step
        return raw


def vector_of(length: int) -> Reals:
    """Multiples of the step, mostly below 1."""
    drawn = np.random.default_rng(0).normal(scale=0.3, size=length)
    return np.clip(np.round(drawn * 2**18) / 2**18, -8, 8)


def upload_step(spec: str) -> int:
    """The step at which clients of a protocol send what depends on their vectors."""
    vectors = Vectors(np.zeros(8), 4)
    terms = Terms(keys.fresh(SESSION), tuple(vectors), 8, ENCODING)
    rehearse(build(spec), vectors, terms=terms, down=vectors.watch)
    return vectors.asked


def play_ours(spec: str, clients: int, length: int, lost: int) -> tuple[Cost, int]:
    """One round and its number of steps, with the sum checked."""
    aggregation, vector = build(spec), vector_of(length)
    terms = Terms(keys.fresh(SESSION), tuple(range(clients)), length, ENCODING)
    drops = dict.fromkeys(range(lost), upload_step(spec)) if lost else {}
    total, cost = rehearse(aggregation, Vectors(vector, clients), terms=terms, drops=drops)
    error = np.abs(total.values - (clients - lost) * vector).max()
    if error > 1e-5:
        raise SystemExit(f"{spec}: the sum is off by {error}")
    return cost, len(cost.server_seconds)


def play_flower(
    clients: int, length: int, lost: int, shares: int = 0, threshold: int = 0
) -> tuple[Cost, int]:
    """The same of Flower's SecAgg+; all clients are neighbours unless told."""
    from flower_secagg import play

    vector = vector_of(length)
    average, cost = play(
        vector,
        clients=clients,
        shares=shares or clients,
        threshold=threshold or clients // 2 + 1,
        gone=frozenset(range(lost)),
    )
    if average is None or np.abs(average - vector).max() > 1e-5:
        raise SystemExit("Flower's sum is wrong")
    return cost, 4


def play(cell: Cell) -> Cell:
    """A cell's figures, measured here."""
    lost = int(cell["dropout"] * cell["clients"])
    size = cell["clients"], cell["length"], lost
    if cell["protocol"] == FLOWER:
        cost, steps = play_flower(*size)
    else:
        cost, steps = play_ours(cell["protocol"], *size)
    stayed = range(lost, cell["clients"])

    def typical(by_client: Mapping[int, float]) -> float:
        return statistics.median(by_client[c] for c in stayed)

    return {
        **cell,
        "lost": lost,
        "steps": steps,
        "client_ms": 1e3 * typical(cost.client_seconds),
        "server_ms": 1e3 * sum(cost.server_seconds),
        "helper_ms": 1e3 * max(cost.helper_seconds.values(), default=0.0),
        "bytes_up": typical(cost.bytes_up),
        "bytes_down": typical(cost.bytes_down),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def apart(cell: Cell) -> Cell:
    """A cell's figures from a fresh process with little memory, and the CPU seconds it took."""
    run = subprocess.run(
        [sys.executable, __file__, "--cell", json.dumps(cell)], capture_output=True, text=True
    )
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or [f"exit status {run.returncode}"]
        return {**cell, "failed": last[0]}
    found: Cell = json.loads(run.stdout)
    return found


def lengths_to_play(wanted: list[int]) -> list[int]:
    """Lengths to climb by: 250 times powers of four, and those wanted."""
    steps = {FIRST * 4**i for i in range(9) if FIRST * 4**i < max(wanted)}
    return sorted(steps | set(wanted))


def column(head: Cell, wanted: list[int], *, limit: float, kept: dict[str, Cell]) -> None:
    """All lengths of one protocol, number of clients and dropout: played, or scaled and so said."""
    played: list[Cell] = []
    for length in lengths_to_play(wanted):
        cell = {**head, "length": length}
        found = kept.get(key_of(cell))
        if found is None or "scaled_from" in found:
            if len(played) > 1:
                if predicted(played, length) > limit:
                    break
                if predicted(played, min(w for w in wanted if w >= length)) <= limit:
                    cell["length"] = length = min(w for w in wanted if w >= length)
            found = kept.get(key_of(cell))
        if found is None or "scaled_from" in found:
            found = kept[key_of(cell)] = apart(cell)
            show(found)
        if "failed" in found:
            break
        if not played or length > played[-1]["length"]:
            played.append(found)
    for length in wanted:
        if len(played) > 1 and length > played[-1]["length"]:
            cell = scaled(played[-2], played[-1], {**head, "length": length})
            kept[key_of(cell)] = cell
            show(cell)


def predicted(played: list[Cell], length: int) -> float:
    """CPU seconds that a longer vector will take: on the line through the last two played."""
    a, b = played[-2:]
    slope = max(0.0, (b["seconds"] - a["seconds"]) / (b["length"] - a["length"]))
    return float(b["seconds"] + slope * (length - b["length"]))


def scaled(short: Cell, long: Cell, cell: Cell) -> Cell:
    """Figures on the line through two lengths that were played."""
    ratio = (cell["length"] - short["length"]) / (long["length"] - short["length"])
    return {
        **cell,
        "lost": long["lost"],
        "steps": long["steps"],
        **{f: short[f] + ratio * (long[f] - short[f]) for f in FIGURES},
        "scaled_from": [short["length"], long["length"]],
    }


def key_of(cell: Cell) -> str:
    return f"{cell['protocol']}/{cell['clients']}/{cell['length']}/{cell['dropout']}"


def show(cell: Cell) -> None:
    """A line of the table."""
    head = f"{cell['protocol']:24} {cell['clients']:4} {cell['length']:9} {cell['dropout']:4.0%} "
    if "failed" in cell:
        print(f"{head} {cell['failed']}", flush=True)
        return
    mark = "~" if "scaled_from" in cell else " "
    helper = f" {cell['helper_ms']:10.1f}" if cell["helper_ms"] else f" {'':10}"
    print(
        f"{head}{mark}{cell['client_ms']:10.1f} {cell['server_ms']:10.1f}{helper} "
        f"{cell['bytes_up'] / 1e6:9.3f} {cell['bytes_down'] / 1e6:9.3f} {cell['steps']:3} "
        f"{cell['peak_mib']:7.0f}",
        flush=True,
    )


HEADING = (
    f"{'protocol':24} {'n':>4} {'length':>9} lost  {'client ms':>10} {'server ms':>10} "
    f"{'helper ms':>10} {'up MB':>9} {'down MB':>9} st. {'MiB':>7}"
)


def against_flower(sizes: list[tuple[int, int, int]], rounds: int) -> list[Cell]:
    """CPU of ours over Flower's with equal shares and thresholds, interleaved round by round."""
    print(
        f"{'n':>4} {'shares':>6} {'length':>8}   {'client ms':>19} {'ratio (range)':>20}   "
        f"{'server ms':>21} {'ratio (range)':>20}"
    )
    rows = []
    for clients, shares, length in sizes:
        threshold = shares // 2 + 1
        complete = shares == clients
        spec = (
            f"secagg:threshold={threshold}"
            if complete
            else f"secagg-plus:neighbours={shares - 1},threshold={threshold}"
        )
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(times(play_ours(spec, clients, length, 0)[0]))
            theirs.append(times(play_flower(clients, length, 0, shares, threshold)[0]))
        row: Cell = {"clients": clients, "shares": shares, "length": length, "rounds": rounds}
        line = f"{clients:4} {shares:6} {length:8}  "
        for i, side in enumerate(("client", "server")):
            mine, other = [o[i] for o in ours], [t[i] for t in theirs]
            ratios = [a / b for a, b in zip(mine, other, strict=True)]
            row[side] = {
                "ours_ms": statistics.median(mine),
                "flower_ms": statistics.median(other),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
            line += (
                f" {row[side]['ours_ms']:9.1f} {row[side]['flower_ms']:9.1f} "
                f"{row[side]['ratio']:7.3f} ({min(ratios):.3f}-{max(ratios):.3f})  "
            )
        print(line, flush=True)
        rows.append(row)
    return rows


def times(cost: Cost) -> tuple[float, float]:
    """Milliseconds of a client, median, and of the server."""
    return (
        1e3 * statistics.median(cost.client_seconds.values()),
        1e3 * sum(cost.server_seconds),
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocols", default="", help="comma-separated specs; all, and flower")
    parser.add_argument("--clients", type=numbers, default=[4, 16, 64, 256])
    parser.add_argument("--lengths", type=numbers, default=[60_000, 1_000_000, 11_000_000])
    parser.add_argument("--dropouts", default="0,0.1,0.3")
    parser.add_argument("--limit", type=float, default=120, help="CPU seconds of a cell")
    parser.add_argument("--quick", action="store_true", help="small cells, at most 20 s each")
    parser.add_argument("--against-flower", action="store_true")
    parser.add_argument("--sizes", default="10:10,50:11,50:50", help="clients:shares,...")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        began = time.process_time()
        try:
            found = play(json.loads(options.cell))
        except (Aborted, MemoryError) as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        print(json.dumps({**found, "seconds": time.process_time() - began}))
        return
    stored: Cell = {"environment": {"python": platform.python_version(), "cpus": os.cpu_count()}}
    if options.out and options.out.exists():
        stored = json.loads(options.out.read_text())

    def store() -> None:
        if options.out:
            options.out.write_text(json.dumps(stored, indent=1) + "\n")

    if options.against_flower:
        shares = [tuple(map(int, pair.split(":"))) for pair in options.sizes.split(",")]
        sizes = [(n, k, d) for d in options.lengths[:2] for n, k in shares]
        stored["against_flower"] = against_flower(sizes, options.rounds)
        store()
        return
    clients, lengths, limit = options.clients, options.lengths, options.limit
    if options.quick:
        clients, lengths, limit = [4, 16], [60_000], 20
    specs = [s for s in options.protocols.replace(";", ",").split(",") if s]
    kept: dict[str, Cell] = stored.setdefault("cells", {})
    print(HEADING)
    for spec in specs or [*aggregations(), FLOWER]:
        for n in clients:
            for dropout in map(float, options.dropouts.split(",")):
                head = {"protocol": spec, "clients": n, "dropout": dropout}
                column(head, lengths, limit=limit, kept=kept)
                store()


if __name__ == "__main__":
    main()
