"""Inverting Gradients: ours against breaching's, on the same networks, gradients and iterations.

    case DIR       write weights, images and one gradient per image
    ours DIR       attack every gradient with gradleak
    table DIR      print both, with the paired difference

breaching runs in an environment of its own (`peers/run_breaching.py`); README.md has the commands.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from gradleak import data, models
from gradleak.attacks.recipes.inverting_gradients import InvertingGradients
from gradleak.metrics import clustered_mean, paired_difference
from gradleak.observation import observe
from gradleak.seeding import target_generator

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from case_folder import append, done, gradient_file, psnr_db, read_case, results


def write_case(folder: Path, *, model: str, images: int, seed: int) -> None:
    """Write what both attacks are given, and the truth they are scored against."""
    folder.mkdir(parents=True, exist_ok=True)
    source = data.load("cifar10")
    chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:images]
    batch = source.batch(chosen)
    network = models.build(model, source.spec, seed=seed).eval()
    save_file(
        {k: v.contiguous() for k, v in network.state_dict().items()}, folder / "state.safetensors"
    )
    save_file({"images": batch.inputs, "labels": batch.labels}, folder / "truth.safetensors")
    names = [name for name, _ in network.named_parameters()]
    for i in range(images):
        loss = cross_entropy(network(batch.inputs[i : i + 1]), batch.labels[i : i + 1])
        gradient = torch.autograd.grad(loss, list(network.parameters()))
        save_file(dict(zip(names, gradient, strict=True)), gradient_file(folder, i))
    case = {
        "model": model,
        "seed": seed,
        "indices": chosen.tolist(),
        "shape": list(source.spec.shape),
        "classes": source.spec.classes,
        "mode": "eval",
        "data": source.fingerprint,
    }
    (folder / "case.json").write_text(json.dumps(case, indent=1) + "\n")


def attack_case(folder: Path, *, iterations: int) -> None:
    """Attack each gradient by itself with `inverting-gradients`, labels known."""
    network, spec, truth = read_case(folder)
    attack = InvertingGradients(steps=iterations, restarts=1)
    warm = False
    for i in range(len(truth["images"])):
        if done(folder, "gradleak", iterations, i):
            continue
        seen = observe(
            network,
            update=load_file(gradient_file(folder, i)),
            data=spec,
            batch_size=1,
            labels=truth["labels"][i : i + 1],
        )
        if not warm:  # the first call pays for imports and caches
            replace(attack, steps=2)(seen, generator=target_generator(0, i))
            warm = True
        before = time.process_time()
        claim = attack(seen, generator=target_generator(0, i))
        seconds = time.process_time() - before
        append(folder, "gradleak", iterations, i, claim.batch.inputs, truth["images"], seconds)


def print_table(folder: Path) -> None:
    """Print PSNR and CPU seconds of every attack and each paired difference to ours."""
    truth = load_file(folder / "truth.safetensors")
    scores: dict[tuple[str, int], dict[int, tuple[float, float]]] = {}
    for row in results(folder):
        claim = load_file(folder / "claims" / row["claim"])["claim"]
        image = truth["images"][row["image"]]
        key = (row["attack"], row["iterations"])
        scores.setdefault(key, {})[row["image"]] = (psnr_db(claim[0], image), row["cpu_seconds"])
    case = json.loads((folder / "case.json").read_text())
    print(f"{case['model']}, untrained, eval mode, batch 1, labels known, one thread\n")
    print(
        "| attack | iterations | n | PSNR dB (95 %) | lowest | CPU s per image "
        "| gradleak − it, dB (95 %) |"
    )
    print("|---|---|---|---|---|---|---|")
    for (attack, iterations), rows in sorted(
        scores.items(), key=lambda item: (item[0][1], item[0])
    ):
        images = sorted(rows)
        psnr = [rows[i][0] for i in images]
        mean = sum(psnr) / len(psnr)
        seconds = sum(rows[i][1] for i in images) / len(images)
        ours = scores.get(("gradleak", iterations), {})
        shared = [i for i in images if i in ours]
        difference = "–"
        if attack != "gradleak" and len(shared) > 1:
            first = [[ours[i][0]] for i in shared]
            second = [[rows[i][0]] for i in shared]
            gap = sum(a[0] - b[0] for a, b in zip(first, second, strict=True)) / len(shared)
            span = paired_difference(first, second)
            difference = f"{gap:+.2f} [{span.low:+.2f}, {span.high:+.2f}], n={len(shared)}"
        inside = clustered_mean([[p] for p in psnr]) if len(psnr) > 1 else None
        interval = f" [{inside.low:.2f}, {inside.high:.2f}]" if inside else ""
        print(
            f"| {attack} | {iterations} | {len(psnr)} | {mean:.2f}{interval} | {min(psnr):.2f} "
            f"| {seconds:.1f} | {difference} |"
        )


def main() -> None:
    """Parse the command line and run one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parts = parser.add_subparsers(dest="part", required=True)
    case = parts.add_parser("case", help="write a case")
    case.add_argument("folder", type=Path)
    case.add_argument("--model", default="convnet", choices=sorted(models.MODELS))
    case.add_argument("--images", type=int, default=16)
    case.add_argument("--seed", type=int, default=0)
    ours = parts.add_parser("ours", help="attack the case with gradleak")
    ours.add_argument("folder", type=Path)
    ours.add_argument("--iterations", type=int, required=True)
    table = parts.add_parser("table", help="print the comparison")
    table.add_argument("folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part == "case":
        write_case(given.folder, model=given.model, images=given.images, seed=given.seed)
    elif given.part == "ours":
        attack_case(given.folder, iterations=given.iterations)
    else:
        print_table(given.folder)


if __name__ == "__main__":
    main()
