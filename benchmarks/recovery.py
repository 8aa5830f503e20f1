"""What the parts of secure aggregation cost: unmasking, masks, encoding, sharing.

    python benchmarks/recovery.py --out recovery.json

CPU seconds on one thread, medians over `--rounds` in which the subjects take turns; n clients of
whom 30 % drop out right before they upload. SecAgg's recovery is what the best implementation
must do: the self mask of every survivor and the pairwise masks of every dropped client with every
survivor, 32-bit words from ChaCha20, added in place. Its key agreements and joins of shares are
left out. LightSecAgg's is whole, from the answers to the sum of the vectors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradleak.crypto import keys, ntt
from gradleak.crypto.encoding import centred
from gradleak.crypto.field import M31, M61, Field
from gradleak.crypto.ramp import Code, Sizes, lagrange_code, spectral_code
from gradleak.crypto.sharing import join, split

Subject = Callable[[], object]
SEED = bytes(range(32))


def secagg(survivors: int, dropped: int, length: int) -> Subject:
    """All masks that a server must expand."""
    total = np.zeros(length, np.uint32)

    def unmask() -> None:
        for k in range(survivors + survivors * dropped):
            np.add(total, keys.words32(k.to_bytes(32, "little"), length), out=total)

    return unmask


def recovery(code: Code, length: int) -> Subject:
    """From the last answers that arrive."""
    field, width = code.field, code.sizes.width(length)
    answers = {
        place: field.write(field.uniform(place.to_bytes(32, "little"), width))
        for place in range(code.sizes.holders - code.sizes.needed, code.sizes.holders)
    }
    uploads = field.uniform(SEED, length)

    def recover() -> None:
        shares = {place: field.read(words, width) for place, words in answers.items()}
        centred(field.sub(uploads, code.recover(shares, length)), field.modulus)

    return recover


def mask(field: Field, length: int) -> Subject:
    """One mask and its addition, modulo a prime."""
    total = field.uniform(SEED, length)
    return lambda: field.add(total, field.uniform(SEED, length))


def mask32(length: int) -> Subject:
    """One mask and its addition, modulo 2³²."""
    total = np.zeros(length, np.uint32)
    return lambda: np.add(total, keys.words32(SEED, length), out=total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--length", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    n, length = options.clients, options.length
    dropped = 3 * n // 10
    yardstick = f"secagg recovery, {dropped} of {n} dropped"
    subjects: dict[str, Subject] = {yardstick: secagg(n - dropped, dropped, length)}
    for private in (3 * n // 10, n // 2):
        of = Sizes(n, private, n - dropped)
        for name, make, fields in (
            ("lightsecagg", lagrange_code, (M31, M61)),
            ("fastsecagg", spectral_code, (ntt.N31, ntt.N50)),
        ):
            for field in fields:
                code = make(field, of)
                about = f"T={private}, {field.bits} bits"
                vector = field.uniform(SEED, length)
                subjects[f"{name} recovery, {about}"] = recovery(code, length)
                subjects[f"{name} encoding, {about}"] = lambda c=code, v=vector: c.share(v)  # type: ignore[misc]
    large = 11_000_000
    subjects["mask of 11M, modulo 2^32"] = mask32(large)
    subjects["mask of 11M, modulo 2^31-1"] = mask(M31, large)
    subjects["mask of 11M, modulo 2^61-1"] = mask(M61, large)
    shares = split(SEED, 171, range(256))
    subjects["split, 171 of 256"] = lambda: split(SEED, 171, range(256))
    subjects["join, 171 of 256"] = lambda: join(shares, 171)

    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(options.rounds):
        for name, subject in subjects.items():
            began = time.process_time()
            subject()
            seconds[name].append(time.process_time() - began)
    base = seconds[yardstick]
    print(f"{'subject':45s} {'CPU s':>9s}  secagg's recovery / this, range over rounds")
    for name, spent in seconds.items():
        ratios = sorted(a / b for a, b in zip(base, spent, strict=True))
        ratio = f"{ratios[0]:8.1f} to {ratios[-1]:.1f}" if "recovery" in name else ""
        print(f"{name:45s} {statistics.median(spent):9.4f}  {ratio}")
    if options.out:
        options.out.write_text(json.dumps({"length": length, "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
