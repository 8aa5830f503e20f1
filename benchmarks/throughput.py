"""Targets finished per CPU minute: Inverting Gradients here and in breaching, equal iterations.

The same lossless CIFAR-10 images, untrained networks, batch 1, labels known, and the weight of
total variation that is breaching's default, so that both minimise one objective. gradleak attacks
all targets in one vectorised search, breaching one after the other in its own environment. They
take turns: in every round breaching attacks the next share of its targets, gradleak all of its own.

    python benchmarks/throughput.py FOLDER --peer-python PATH --cases "lenet:300:4;resnet18:50:2:8"
    python benchmarks/throughput.py FOLDER --curve "lenet:100:1,4,16,32,128"

A case is NETWORK:ITERATIONS:ROUNDS[:PEER TARGETS]; a curve is NETWORK:ITERATIONS:TRIALS,...
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from cases import Case
from compare import difference, new_case, observations, shortened

from gradleak import attacks
from gradleak.metrics import clustered_mean
from gradleak.types import Reconstruction

TARGETS = 32
CASES = "lenet:300:4;convnet:300:4;resnet18:50:2:8"
ATTACK = "inverting-gradients:total_variation=0.2"
TITLE = "gradleak"


def fresh_case(folder: Path, network: str) -> Case:
    """The 32 targets of the comparison on one network; results of an earlier run are dropped."""
    new_case(
        folder,
        dataset="cifar10",
        network=network,
        batch=1,
        targets=TARGETS,
        first=0,
        last=4000,
        seed=1,
        train_steps=0,
    )
    (folder / "results.jsonl").unlink(missing_ok=True)
    return Case.read(folder)


def attack_together(
    case: Case, targets: list[int], *, iterations: int
) -> tuple[list[Reconstruction], float]:
    """All targets in one call, the choice of engine included: claims and CPU seconds."""
    attack = attacks.build(f"{ATTACK},steps={iterations}")
    seen = observations(case, targets, ["labels"])
    attacks.attack_all(shortened(attack), seen)
    before = time.process_time()
    claims = attacks.attack_all(attack, seen)
    return claims, time.process_time() - before


def compared(
    folder: Path, network: str, *, iterations: int, rounds: int, peer: int, peer_python: str
) -> dict[str, Any]:
    """Alternate the two for so many rounds; quality over shared targets, rates per round.

    Args:
        folder: where the case goes.
        network: registered, or a variant of `networks.py`.
        iterations: of both.
        rounds: turns; gradleak attacks 1/rounds of its targets again and again if they are few.
        peer: how many of the targets breaching attacks in all.
        peer_python: the interpreter of breaching's environment.
    """
    case = fresh_case(folder, network)
    script = Path(__file__).parent / "run_breaching.py"
    title = f"breaching:iterations={iterations}"
    ours_seconds, peer_seconds, engine = [], [], ""
    for turn in range(rounds):
        share = [t for t in range(peer) if t % rounds == turn]
        command = [peer_python, str(script), str(folder), "--iterations", str(iterations)]
        subprocess.run([*command, "--targets", ",".join(map(str, share))], check=True)
        spent = {r["target"]: r["cpu_seconds"] for r in case.results() if r["attack"] == title}
        peer_seconds.append(statistics.mean(spent[t] for t in share))
        claims, seconds = attack_together(case, list(range(TARGETS)), iterations=iterations)
        ours_seconds.append(seconds / TARGETS)
        engine = claims[0].engine
        print(f"{network}, round {turn}: {peer_seconds[-1]:.2f} and {ours_seconds[-1]:.2f} CPU s")
    for target, claim in enumerate(claims):
        case.append(
            TITLE, "labels", target, claim.batch, statistics.median(ours_seconds), ours=True
        )
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in case.results():
        rows.setdefault((row["attack"], row["knows"]), {})[row["target"]] = row
    ours, theirs = rows[TITLE, "labels"], rows[title, "labels"]
    ratios = [p / o for p, o in zip(peer_seconds, ours_seconds, strict=True)]
    return {
        "network": network,
        "iterations": iterations,
        "engine": engine,
        "ours_targets": TARGETS,
        "peer_targets": peer,
        "ours_cpu_seconds_per_target": ours_seconds,
        "peer_cpu_seconds_per_target": peer_seconds,
        "ours_per_cpu_minute": 60 / statistics.median(ours_seconds),
        "peer_per_cpu_minute": 60 / statistics.median(peer_seconds),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ours_mean_psnr_db": mean_psnr(ours),
        "peer_mean_psnr_db": mean_psnr(theirs),
        "difference": difference(ours, (TITLE, "labels"), rows, reference=(title, "labels")),
    }


def mean_psnr(found: dict[int, dict[str, Any]]) -> list[float]:
    """Mean PSNR in dB with the ends of its 95 % interval."""
    clusters = [r["psnr_db"] for r in found.values()]
    span = clustered_mean(clusters)
    return [statistics.mean(p for c in clusters for p in c), span.low, span.high]


def curve(folder: Path, network: str, *, iterations: int, trials: list[int]) -> dict[str, Any]:
    """Targets per CPU minute against trials at once; targets repeat beyond 32."""
    case = fresh_case(folder, network)
    points = []
    for count in trials:
        targets = [t % TARGETS for t in range(count)]
        claims, seconds = attack_together(case, targets, iterations=iterations)
        rate = 60 * count / seconds
        points.append({"trials": count, "engine": claims[0].engine, "per_cpu_minute": rate})
        print(f"{network}, {count:4} trials, {claims[0].engine}: {rate:.1f} per CPU minute")
    return {"network": network, "iterations": iterations, "points": points}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the comparison."""
    print(
        "\n| network | iterations | gradleak, targets per CPU min | breaching | ratio (range) "
        "| gradleak, mean dB | breaching, mean dB | difference, dB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        low, high = r["ratio_range"]
        ours, theirs = r["ours_mean_psnr_db"], r["peer_mean_psnr_db"]
        print(
            f"| {r['network']} | {r['iterations']} | {r['ours_per_cpu_minute']:.1f} ({r['engine']})"
            f" | {r['peer_per_cpu_minute']:.2f} | {r['ratio']:.1f} ({low:.1f}–{high:.1f}) "
            f"| {ours[0]:.2f} [{ours[1]:.2f}, {ours[2]:.2f}] "
            f"| {theirs[0]:.2f} [{theirs[1]:.2f}, {theirs[2]:.2f}] | {r['difference']} |"
        )


def main() -> None:
    """Parse the command line, measure, print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="where cases and throughput.json go")
    parser.add_argument("--peer-python", help="interpreter of breaching's environment")
    parser.add_argument("--cases", default=CASES, help="NETWORK:ITERATIONS:ROUNDS[:PEER];...")
    parser.add_argument("--curve", help="NETWORK:ITERATIONS:TRIALS,...;... instead of --cases")
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    if given.curve:
        for part in given.curve.split(";"):
            network, iterations, trials = part.split(":")
            counts = [int(t) for t in trials.split(",")]
            folder = given.folder / f"curve-{network}"
            rows.append(curve(folder, network, iterations=int(iterations), trials=counts))
    elif given.peer_python is None:
        parser.error("--peer-python is needed: the interpreter that has breaching")
    else:
        for part in given.cases.split(";"):
            network, iterations, rounds, *peer = part.split(":")
            rows.append(
                compared(
                    given.folder / network,
                    network,
                    iterations=int(iterations),
                    rounds=int(rounds),
                    peer=int(peer[0]) if peer else TARGETS,
                    peer_python=given.peer_python,
                )
            )
        print_table(rows)
    name = "curve" if given.curve else "throughput"
    record = {"torch": torch.__version__, "rows": rows}
    (given.folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
