"""Measure what protections cost a federated diffusion model, and what they hide: a table.

    python docs/assets/diffusion_quality.py start DIR
    python docs/assets/diffusion_quality.py measure DIR
    python docs/assets/diffusion_quality.py leak DIR gidm 4 known
    python docs/assets/diffusion_quality.py table DIR

Needs MNIST in $GRADLEAK_DATA. `start` trains the U-Net briefly on public images; `measure` goes on
from there with ten clients, once per protection, and skips what is done. `leak` attacks single
clients of that start, under the same protections, with any attack; "known" grants noise and
times. `table` prints what there is.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import gradleak as gl
from gradleak import attacks, data, defenses, models, priors
from gradleak.errors import NotApplicable
from gradleak.federate.federation import federation
from gradleak.federate.settings import TrainSettings
from gradleak.federate.training import train
from gradleak.mechanisms import DenoisingAvg
from gradleak.metrics.statistics import clustered_mean
from gradleak.run.trial import divide
from gradleak.types import Fact, ModelState

RATE, MINIBATCH, STEPS = 0.005, 4, 4
COMMON = TrainSettings(
    data="mnist",
    model="unet",
    mechanism=f"denoising-fedavg:learning_rate={RATE},minibatch_size={MINIBATCH}",
    clients=10,
    rounds=4,
    batch_size=MINIBATCH * STEPS,
    test_examples=200,
    samples=64,
)
ROWS = {
    "none": ("none", "none"),
    "noise": ("gaussian-noise:std=0.003", "none"),
    "noise-high": ("gaussian-noise:std=0.03", "none"),
    "dp": ("dp-sgd:norm=0.01,noise_multiplier=1", "none"),
    "top-k": ("top-k:fraction=0.01", "none"),
    "time": ("partial-sharing:withheld=time_embedding/time,frozen=true", "none"),
    "clip": ("clip:norm=0.005", "none"),
    "dp-weak": ("dp-sgd:norm=0.01,noise_multiplier=0.3", "none"),
    "noise-low": ("gaussian-noise:std=0.001", "none"),
    "secagg": ("none", "secagg"),
}
"""Protection of every client, and protocol."""


def start(directory: Path) -> Path:
    """Weights that training begins with: 300 steps on 2,000 public images."""
    path = directory / "start.safetensors"
    if not path.exists():
        mnist = data.load("mnist")
        public = mnist.batch(divide(mnist, 0).public[:2000])
        family = priors.Diffusion(
            steps=300, width=16, conditional=False, batch_size=32, averaging=0.9
        )
        prior = priors.train(family, priors.prepared(public, mnist.spec), mnist.spec, seed=0)
        assert isinstance(prior, priors.Denoiser)
        network = models.build("unet", mnist.spec, seed=0)
        network.load_state_dict(dict(prior.network))
        models.save_weights(ModelState.of(network), path)
    return path


def settings_of(name: str, directory: Path) -> TrainSettings:
    """The training of a row."""
    defense, aggregation = ROWS[name]
    given = replace(COMMON, weights=str(start(directory)), defense=defense)
    return replace(given, aggregation=aggregation, min_clients=2 if aggregation != "none" else 1)


def measure(directory: Path) -> None:
    """Train every row, and judge the start."""
    if not (directory / "start.json").exists():
        made = federation(settings_of("none", directory))
        _, loss, _ = made.test(made.initial, final=True)
        quality = made.quality(made.initial)
        assert quality is not None
        told = {"loss": loss, "frechet": quality.frechet, "floor": quality.floor}
        (directory / "start.json").write_text(json.dumps(told))
    for name in ROWS:
        began = time.process_time()
        found = train(settings_of(name, directory), out=directory / name)
        quality = found["sample_quality"]
        print(
            name, f"loss {found['test_loss']:.4f}", quality["frechet"], quality["floor"],
            f"{time.process_time() - began:.0f} CPU s", flush=True,
        )  # fmt: skip


def leak(directory: Path, attack: str, count: int, *, known: bool) -> None:
    """PSNR of what `attack` makes of one client with one image, under every protection.

    The client makes one local step, with the noise or the bound of the whole table; of `secagg`
    the sum over ten such clients is attacked.
    """
    mnist = data.load("mnist")
    halves = divide(mnist, 0)
    state = models.load_weights(start(directory), models.build("unet", mnist.spec, seed=0))
    granted = {Fact.MECHANISM, Fact.BATCH_SIZE, Fact.PRIOR}
    granted |= {Fact.TIMESTEPS, Fact.NOISE} if known else set()
    prior = priors.load(priors.TRAINED["diffusion-mnist"])
    for name, (defense, aggregation) in ROWS.items():
        clients = COMMON.clients if aggregation != "none" else 1
        facts = granted if clients == 1 else granted - {Fact.TIMESTEPS, Fact.NOISE}
        scores = []
        for target in range(count):
            scenario = gl.Scenario(
                mnist,
                state,
                defenses.build(defense)(DenoisingAvg(learning_rate=RATE)),
                gl.ThreatModel(frozenset(facts), view="aggregate" if clients > 1 else "client"),
                batch_size=1,
                indices=halves.clients[clients * target : clients * (target + 1)],
                clients=clients,
                prior=prior,
            )
            generator = torch.Generator().manual_seed(target)
            seen, truth = gl.simulate(scenario, generator=generator)
            try:
                (claim,) = attacks.attack_all(attacks.build(attack), [seen], seed=target)
            except NotApplicable as reason:
                print(name, reason, flush=True)
                break
            scores.append([gl.metrics.psnr_db(claim.batch, truth.batch)])
        if len(scores) < count:
            continue
        print(name, attack, told_of([s for (s,) in scores]), flush=True)
        path = directory / f"leak-{attack.partition(':')[0]}-{'known' if known else 'private'}.json"
        told = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(told | {name: [s for (s,) in scores]}))


def told_of(scores: list[float]) -> str:
    """Mean and 95 % interval over targets."""
    interval = clustered_mean([[s] for s in scores])
    mean = sum(scores) / len(scores)
    return f"{mean:.1f} ({interval.low:.1f} to {interval.high:.1f}), n = {len(scores)}"


def table(directory: Path) -> None:
    """Print the table, with a column for every attack that was run."""
    columns = {p.stem.removeprefix("leak-"): p for p in sorted(directory.glob("leak-*.json"))}
    leaks = {name: json.loads(path.read_text()) for name, path in columns.items()}
    heads = ["protection", "denoising loss", "Fréchet distance", *(f"{c}, dB" for c in columns)]
    print("| " + " | ".join(heads) + " |")
    print("|" + "---|" * len(heads))
    if (directory / "start.json").exists():
        found = json.loads((directory / "start.json").read_text())
        row = ["the start", f"{found['loss']:.4f}", f"{found['frechet']:.2f}"]
        print("| " + " | ".join(row + [""] * len(columns)) + " |")
        print("real images among themselves:", found["floor"], file=sys.stderr)
    for name, (defense, aggregation) in ROWS.items():
        path = directory / name / "training.json"
        if not path.exists() or (found := json.loads(path.read_text()))["status"] != "done":
            continue
        quality = found["sample_quality"]
        row = [f"`{defense if aggregation == 'none' else aggregation}`"]
        row += [f"{found['test_loss']:.4f}", f"{quality['frechet']:.2f}"]
        for told in leaks.values():
            row.append(told_of(told[name]) if name in told else "")
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, where = sys.argv[1], Path(sys.argv[2])
    where.mkdir(parents=True, exist_ok=True)
    if task == "leak":
        leak(where, sys.argv[3], int(sys.argv[4]), known=sys.argv[5:] == ["known"])
    else:
        {"start": start, "measure": measure, "table": table}[task](where)
