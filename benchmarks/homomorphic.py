"""What aggregation under a shared key and between servers costs.

python benchmarks/homomorphic.py table --out homomorphic.json
python benchmarks/homomorphic.py packing --bits 2048
python benchmarks/homomorphic.py stream --length 11000000 --clients 2
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradleak.crypto import Aggregation, FixedPoint, Terms, keys
from gradleak.crypto.additive import AdditiveMpc
from gradleak.crypto.ckks import Ckks
from gradleak.crypto.homomorphic import TAGS, Holder, Running
from gradleak.crypto.paillier import Paillier
from gradleak.crypto.protocol import SESSION
from gradleak.crypto.rehearsal import rehearse

FINE = FixedPoint(clip=8, fraction=26)


def seconds(work: Callable[[], object]) -> float:
    """CPU of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def round_of(
    aggregation: Aggregation, length: int, clients: int, encoding: FixedPoint
) -> dict[str, Any]:
    """One rehearsed round: CPU seconds and bytes."""
    draw = np.random.default_rng(0)
    vectors = {n: draw.normal(size=length) for n in range(clients)}
    terms = Terms(keys.fresh(SESSION), tuple(vectors), length, encoding)
    total, cost = rehearse(aggregation, vectors, terms=terms)
    client = [cost.client_seconds[n] for n in vectors]
    return {
        "protocol": aggregation.id,
        "length": length,
        "clients": clients,
        "client_seconds": statistics.median(client),
        "busiest_client_seconds": max(client),
        "helper_seconds": max(cost.helper_seconds.values(), default=0.0),
        "server_seconds": sum(cost.server_seconds),
        "client_bytes_up": statistics.median(cost.bytes_up[n] for n in vectors),
        "client_bytes_down": statistics.median(cost.bytes_down[n] for n in vectors),
        "error": float(np.abs(total.values - sum(vectors.values())).max()),
    }


def ckks_task(length: int, clients: int) -> dict[str, Any]:
    """Encrypt `clients` vectors, add them, decrypt the sum; each part's CPU."""
    draw = np.random.default_rng(1)
    scheme = Ckks()
    terms = Terms(keys.fresh(SESSION), tuple(range(clients)), length, FINE)
    secret, public = scheme.make(terms)
    holder = Holder(scheme, terms, keys.fresh() + secret)
    running, room = Running(scheme.adder(terms, public)), scheme.room(terms)
    true, found = np.zeros(length), np.zeros(0)
    encrypting, adding = [], 0.0
    for client in range(clients):
        vector = draw.normal(size=length)
        true += vector
        began = time.process_time()
        whole = FINE.encode(vector)
        pieces = (whole[at : at + room] for at in range(0, length, room))
        chunks = list(holder.encrypt_chunks(client, pieces))
        encrypting.append(time.process_time() - began)
        adding += seconds(lambda: running.add_chunks(chunks))  # noqa: B023
    began = time.process_time()
    opened = np.concatenate(list(holder.decrypt_chunks(terms.clients, running.chunks())))
    found = FINE.decode(opened, clients=clients)
    opening = time.process_time() - began
    return {
        "length": length,
        "clients": clients,
        "encrypt_one": statistics.median(encrypting),
        "encrypt_all": sum(encrypting),
        "sum": adding,
        "decrypt": opening,
        "one_encrypt_sum_decrypt": statistics.median(encrypting) + adding + opening,
        "all_encrypt_sum_decrypt": sum(encrypting) + adding + opening,
        "error": float(np.abs(found - true).max()),
    }


def packing(bits: int, rounds: int) -> dict[str, Any]:
    """CPU per entry: packed, one entry to a ciphertext, and phe's own floats, taking turns."""
    import phe

    terms = Terms(keys.fresh(SESSION), tuple(range(10)), 1000)
    scheme = Paillier(bits=bits)
    making = seconds(lambda: scheme.make(terms))
    secret, public = scheme.make(terms)
    cipher = scheme.cipher(terms, secret)
    adder = scheme.adder(terms, public)
    room = scheme.room(terms)
    peer = phe.PaillierPublicKey(int.from_bytes(public, "little"))
    values = np.arange(room + TAGS)
    one = adder.take(cipher.encrypt(values))
    figures: dict[str, list[float]] = {"packed": [], "unpacked": [], "phe": [], "ratio": []}
    for _ in range(rounds):
        figures["packed"].append(seconds(lambda: cipher.encrypt(values)) / room)
        figures["unpacked"].append(seconds(lambda: cipher.encrypt(values[:1])))
        figures["phe"].append(seconds(lambda: peer.encrypt(0.25)))
        figures["ratio"].append(figures["unpacked"][-1] / figures["packed"][-1])
    raw = adder.give(one)
    opening = [seconds(lambda: cipher.decrypt(raw, room + TAGS, 1)) for _ in range(rounds)]
    adding = [seconds(lambda: adder.add(one, one)) for _ in range(rounds)]
    taking = [seconds(lambda: adder.take(raw)) for _ in range(rounds)]
    return {
        "bits": bits,
        "entries_per_ciphertext": room,
        "key_seconds": making,
        **{
            f"{name}_seconds_per_entry": statistics.median(figures[name])
            for name in ("packed", "unpacked", "phe")
        },
        "unpacked_over_packed": statistics.median(figures["ratio"]),
        "unpacked_over_packed_range": [min(figures["ratio"]), max(figures["ratio"])],
        "phe_over_packed": statistics.median(figures["phe"]) / statistics.median(figures["packed"]),
        "decrypt_seconds_per_ciphertext": statistics.median(opening),
        "add_seconds_per_ciphertext": statistics.median(adding),
        "judge_seconds_per_ciphertext": statistics.median(taking),
        "rounds": rounds,
    }  # fmt: skip


def stream(length: int, clients: int) -> dict[str, Any]:
    """A sum of long vectors, ciphertext by ciphertext; peak resident memory of this process."""
    scheme = Ckks()
    terms = Terms(keys.fresh(SESSION), tuple(range(clients)), length, FINE)
    secret, public = scheme.make(terms)
    holder = Holder(scheme, terms, keys.fresh() + secret)
    running, room = Running(scheme.adder(terms, public)), scheme.room(terms)

    def vector(client: int) -> Iterator[Any]:
        draw = np.random.default_rng(client)
        for at in range(0, length, room):
            yield draw.normal(size=min(room, length - at))

    spent = [
        seconds(
            lambda: running.add_chunks(
                holder.encrypt_chunks(c, map(FINE.encode, vector(c)))  # noqa: B023
            )
        )
        for c in range(clients)
    ]
    began, error = time.process_time(), 0.0
    true = map(sum, zip(*(vector(c) for c in range(clients)), strict=True))
    opened = holder.decrypt_chunks(terms.clients, running.chunks())
    for piece, want in zip(opened, true, strict=True):
        error = max(error, float(np.abs(FINE.decode(piece, clients=clients) - want).max()))
    return {
        "length": length,
        "clients": clients,
        "encrypt_and_add_seconds_per_client": statistics.median(spent),
        "decrypt_seconds": time.process_time() - began,
        "error": error,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def table(lengths: list[int], clients: list[int], rounds: int) -> list[dict[str, Any]]:
    """Rounds of every protocol; medians over rounds that take turns."""
    protocols = [AdditiveMpc(), AdditiveMpc(servers=3), Ckks(), Paillier()]
    rows = []
    for length in lengths:
        for n in clients:
            runs: list[list[dict[str, Any]]] = [[] for _ in protocols]
            for _ in range(rounds):
                for protocol, kept in zip(protocols, runs, strict=True):
                    if protocol.id != "paillier" or length * n <= 10**6:
                        kept.append(round_of(protocol, length, n, FixedPoint()))
            for protocol, kept in zip(protocols, runs, strict=True):
                if not kept:
                    continue
                row = {
                    key: statistics.median(run[key] for run in kept)
                    if key != "protocol"
                    else f"{protocol.id} ({protocol.servers} servers)"
                    if isinstance(protocol, AdditiveMpc)
                    else protocol.id
                    for key in kept[0]
                }
                rows.append(row)
                print(
                    " | ".join(
                        f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()
                    ),
                    flush=True,
                )
    return rows  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["table", "ckks", "packing", "stream"])
    parser.add_argument("--length", type=int, default=60_000)
    parser.add_argument("--lengths", default="60000,1000000")
    parser.add_argument("--clients", default="10")
    parser.add_argument("--bits", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    clients = [int(n) for n in given.clients.split(",")]
    if given.what == "table":
        found: Any = table([int(d) for d in given.lengths.split(",")], clients, given.rounds)
    elif given.what == "ckks":
        found = [ckks_task(given.length, clients[0]) for _ in range(given.rounds)]
    elif given.what == "packing":
        found = packing(given.bits, given.rounds)
    else:
        found = stream(given.length, clients[0])
    if given.what != "table":
        print(json.dumps(found, indent=2))
    if given.out:
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
