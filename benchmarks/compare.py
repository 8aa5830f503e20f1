"""gradleak's attacks and a peer's on the same networks, gradients and targets.

    case DIR       write a network, targets and their gradients
    ours DIR       attack every target with a gradleak attack
    table DIR ...  print quality and CPU time of every attack, with paired differences

The peer runs in an environment of its own (`run_breaching.py`); README.md has the commands.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import networks
import torch
from cases import Case, write_case

from gradleak import attacks, data, models
from gradleak.mechanisms import FedSGD
from gradleak.mechanisms.client import batch_norm_statistics
from gradleak.metrics import clustered_mean, paired_difference
from gradleak.seeding import target_generator
from gradleak.threat import ThreatModel, Truth
from gradleak.types import Attack, Exchange, Fact, ModelState, Observation, Update


def new_case(
    folder: Path,
    *,
    dataset: str,
    network: str,
    batch: int,
    targets: int,
    first: int,
    last: int,
    seed: int,
    train_steps: int,
) -> None:
    """Draw targets from the examples at index `first` to `last` − 1, train on those below."""
    source = data.load(dataset)
    pool = torch.arange(len(source))[first:last]
    if len(pool) < batch * targets:
        raise SystemExit(
            f"{dataset} has {len(pool)} examples from index {first} to {last}: "
            f"expected at least {batch * targets}"
        )
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    chosen = pool[drawn[: batch * targets]]
    model = networks.build(network, source.spec, seed=seed)
    if train_steps:
        public = torch.arange(first)
        state = models.train(model, source, public, steps=train_steps, seed=seed)
        model.load_state_dict({**state.params, **state.buffers})
    truth = source.batch(chosen)
    about = {
        "network": network,
        "train_steps": train_steps,
        "seed": seed,
        "batch": batch,
        "targets": targets,
        "range": [first, last],
        "indices": chosen.view(targets, batch).tolist(),
        "shape": list(source.spec.shape),
        "classes": source.spec.classes,
        "mode": "eval",
        "data": source.name,
        "fingerprint": source.fingerprint,
    }
    write_case(
        folder,
        about=about,
        network=model.eval(),
        images=truth.inputs.view(targets, batch, *source.spec.shape),
        labels=truth.labels.view(targets, batch),
    )


def observations(case: Case, targets: Sequence[int], knows: Sequence[str]) -> list[Observation]:
    """What the attacker sees of each target; batch size and mechanism are always granted."""
    facts = {Fact.MECHANISM, Fact.BATCH_SIZE, *map(Fact, knows)}
    threat = ThreatModel(knows=frozenset(facts))
    state = ModelState.of(case.network)
    seen = []
    for target in targets:
        batch = case.batch(target)
        exchange = Exchange(state, Update(case.gradient(target), "gradient"))
        truth = Truth(
            batch, trained_on=batch, bn_statistics=batch_norm_statistics(state, batch.inputs)
        )
        seen.append(threat.grant(truth, (exchange,), FedSGD(), case.spec))
    return seen


def attack_case(case: Case, *, spec: str, knows: str, targets: Sequence[int], seed: int) -> None:
    """Attack each target by itself."""
    attack = attacks.build(spec)
    left = [t for t in targets if not case.done(spec, knows, t)]
    warm = False
    for target, seen in zip(left, observations(case, left, facts_of(knows)), strict=True):
        if not warm:  # the first call pays for imports and caches
            shortened(attack)(seen, generator=target_generator(seed, target))
            warm = True
        before = time.process_time()
        claim = attack(seen, generator=target_generator(seed, target))
        seconds = time.process_time() - before
        more = {
            "ours": True,
            "evaluations": claim.evaluations,
            "status": claim.status,
            "engine": claim.engine,
        }
        case.append(spec, knows, target, claim.batch, seconds, **more)


def facts_of(knows: str) -> list[str]:
    return [fact for fact in knows.split(",") if fact]


def shortened(attack: Attack) -> Attack:
    """The same attack with a budget of a few steps, where it has one."""
    if is_dataclass(attack) and any(f.name == "steps" for f in fields(attack)):
        short: Attack = replace(attack, steps=2)
        return short
    return attack


def print_table(case: Case, *, against: str | None) -> None:
    """Print quality at the CPU time spent, cheapest first, and paired differences to one attack."""
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in case.results():
        rows.setdefault((row["attack"], row["knows"]), {})[row["target"]] = row
    about = case.about
    trained = f"{about['train_steps']} training steps" if about["train_steps"] else "untrained"
    print(f"\n{case.folder.name}: {about['network']}, {trained}, {about['mode']} mode, ", end="")
    print(f"{about['data']}, batch {case.batch_size}, {len(case)} targets, one thread\n")
    for file in sorted(case.folder.glob("cost-*.json")):
        cost = json.loads(file.read_text())
        print(
            f"{cost['attack']}: {1e3 * cost['cpu_seconds_per_iteration']:.1f} ms an iteration, "
            f"{cost['default_cpu_seconds']:.0f} CPU s for its default of "
            f"{cost['default_iterations']} iterations\n"
        )
    if not rows:
        return
    peers = [key for key, found in rows.items() if not next(iter(found.values())).get("ours")]
    reference = next((key for key in rows if key[0] == against), peers[0] if peers else None)
    print(
        "| attack | knows | targets | median dB | mean dB (95 %) | lowest | labels "
        "| CPU s per target | minus the reference, dB (95 %) |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for key in sorted(rows, key=lambda key: mean_seconds(rows[key])):
        found = rows[key]
        clusters = [found[t]["psnr_db"] for t in sorted(found)]
        every = [p for cluster in clusters for p in cluster]
        inside = clustered_mean(clusters) if len(clusters) > 1 else None
        interval = f" [{inside.low:.2f}, {inside.high:.2f}]" if inside else ""
        labels = statistics.mean(r["label_accuracy"] for r in found.values())
        print(
            f"| {key[0]} | {key[1] or '–'} | {len(found)} | {statistics.median(every):.2f} "
            f"| {statistics.mean(every):.2f}{interval} | {min(every):.2f} | {labels:.0%} "
            f"| {mean_seconds(found):.1f} | {difference(found, key, rows, reference)} |"
        )


def mean_seconds(found: dict[int, dict[str, Any]]) -> float:
    """CPU seconds per target."""
    return statistics.fmean(r["cpu_seconds"] for r in found.values())


def difference(
    found: dict[int, dict[str, Any]],
    key: tuple[str, str],
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]],
    reference: tuple[str, str] | None,
) -> str:
    """Mean difference to the reference over shared targets, with its interval."""
    if reference is None:
        return "–"
    if key == reference:
        return "reference"
    shared = sorted(set(found) & set(rows[reference]))
    if not shared:
        return "no shared target"
    first = [found[t]["psnr_db"] for t in shared]
    second = [rows[reference][t]["psnr_db"] for t in shared]
    gap = statistics.mean(map(statistics.mean, first)) - statistics.mean(
        map(statistics.mean, second)
    )
    if len(shared) == 1:
        return f"{gap:+.2f}, n=1"
    span = paired_difference(first, second)
    return f"{gap:+.2f} [{span.low:+.2f}, {span.high:+.2f}], n={len(shared)}"


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = parser.add_subparsers(dest="part", required=True)
    case = parts.add_parser("case", help="write a case")
    case.add_argument("folder", type=Path)
    case.add_argument("--network", default="convnet", help="registered, or convnet-gelu, ...")
    case.add_argument("--batch", type=int, default=1, help="images per target")
    case.add_argument("--targets", type=int, default=16)
    case.add_argument("--data", default="cifar10", help="a dataset with a name")
    case.add_argument("--from", dest="first", type=int, default=2000, help="lowest example index")
    case.add_argument("--to", dest="last", type=int, default=3000, help="one above the highest")
    case.add_argument("--seed", type=int, default=0)
    case.add_argument("--train-steps", type=int, default=0, help="on examples below --from")
    ours = parts.add_parser("ours", help="attack the case with gradleak")
    ours.add_argument("folder", type=Path)
    ours.add_argument("--attack", required=True, help="ID:field=value,...")
    ours.add_argument("--knows", default="", help="facts besides mechanism and batch size: labels")
    ours.add_argument("--targets", help="such as 0,3; all by default")
    ours.add_argument("--seed", type=int, default=0, help="of the attacker's randomness")
    table = parts.add_parser("table", help="print the comparison")
    table.add_argument("folders", type=Path, nargs="+")
    table.add_argument("--against", help="attack to take differences from; a peer by default")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "case":
        new_case(
            given.folder,
            dataset=given.data,
            network=given.network,
            batch=given.batch,
            targets=given.targets,
            first=given.first,
            last=given.last,
            seed=given.seed,
            train_steps=given.train_steps,
        )
    elif given.part == "ours":
        held = Case.read(given.folder)
        attack_case(
            held,
            spec=given.attack,
            knows=given.knows,
            targets=held.chosen(given.targets),
            seed=given.seed,
        )
    else:
        for folder in given.folders:
            print_table(Case.read(folder), against=given.against)


if __name__ == "__main__":
    main()
