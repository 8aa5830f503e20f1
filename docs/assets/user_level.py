"""Measure docs/user-level.md: one picture that stands for a user, from the update of one batch.

    python docs/assets/user_level.py faces none SCRATCH [PICTURE]
    python docs/assets/user_level.py faces gaussian-noise:std=0.001 SCRATCH [PICTURE]
    python docs/assets/user_level.py digits none SCRATCH [PICTURE]

faces needs the Olivetti faces in $GRADLEAK_DATA, and trains its prior on the people who are no
users (once; it resumes). digits needs MNIST there and the shipped prior. SCRATCH keeps the prior
and every attack's claims, so that a second call only scores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import gradleak as gl
from gradleak import attacks, data, defenses, models, priors
from gradleak.data import Dataset
from gradleak.metrics import (
    UserRate,
    attribute_inference,
    classifier,
    features,
    fisherfaces,
    gallery,
    majority,
    reidentification,
    similarity,
)
from gradleak.run.jobs import derive
from gradleak.run.trial import divide
from gradleak.types import Batch, Fact, ModelState, Observation, Prior

USERS, BATCH, ROUNDS = 16, 6, 2
GRANTED = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, Fact.LABELS, Fact.PRIOR})
ATTACKS = (
    "user-level-diffusion:steps=200",
    "user-level-diffusion:steps=200,prior_weight=0",
    "inverting-gradients:steps=120",
)
PRIOR = (
    "diffusion:steps=1500,batch_size=32,width=16,conditional=false,averaging=0.995,"
    "precision=bfloat16"
)
SAMPLES = 64


@dataclass
class Case:
    """Updates of users, what scores them, and public pictures.

    `seen` and `batches` go round by round, user after user; `users` says whose each is.
    """

    seen: list[Observation]
    batches: list[Batch]
    users: Tensor
    public: Tensor
    prior: Prior


def main(case: str, defense: str, scratch: Path, picture: Path | None) -> None:
    """Print a line per way of making claims; save a picture of some."""
    torch.set_num_threads(1)
    scratch.mkdir(parents=True, exist_ok=True)
    {"faces": faces, "digits": digits}[case](defense, scratch, picture)


def faces(defense: str, scratch: Path, picture: Path | None) -> None:
    """Who is it? 16 people; every client trains 'the owner of this device' on six of his pictures.

    The network tells 20 public people and 'owner', which four more public people have played: every
    user's labels are the same.
    """
    raw = data.load("olivetti")
    small = F.avg_pool2d(raw.images.float(), 2).round().to(torch.uint8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    people, others = order[:USERS].sort().values, order[USERS:].sort().values
    owner = 20
    task = torch.full((40,), owner)
    task[others[:owner]] = torch.arange(owner)
    dataset = Dataset.of("olivetti-32", small, task[raw.labels], classes=owner + 1)

    rows = torch.isin(raw.labels, others).nonzero().flatten()
    both = torch.cat([small[rows], small[rows].flip(-1)])
    names = torch.searchsorted(others, raw.labels[rows]).repeat(2)
    public = Dataset.of("public people", both, names)
    prior = trained(scratch / "faces.safetensors", public)
    state = ModelState.of(models.build("convnet", dataset.spec, seed=0))

    seen, batches, users, left = [], [], [], []
    for turn in range(ROUNDS):
        for user, person in enumerate(people.tolist()):
            stream = torch.Generator().manual_seed(derive(0, "client", turn * USERS + user))
            own = 10 * person + torch.randperm(10, generator=stream)
            observation, truth = simulated(dataset, state, own[:BATCH], prior, stream, defense)
            seen.append(observation)
            batches.append(truth)
            users.append(user)
            left.append(dataset.batch(own[BATCH:]).inputs)
    everybody = public.batch(torch.arange(len(public)))
    which = torch.arange(len(public))
    pupil = models.train(
        models.build("convnet", public.spec, seed=1),
        public,
        which,
        steps=300,
        seed=1,
        batch_size=32,
    )
    embeddings = {
        "network": features(pupil, everybody.inputs),
        "fisherfaces": fisherfaces(everybody),
    }
    setting = Case(seen, batches, torch.tensor(users), everybody.inputs, prior)
    made = claims(setting, scratch / f"faces-{defense.replace(':', '-')}.safetensors", ATTACKS)
    made["the batch's own mean (oracle)"] = torch.stack([b.inputs.mean(0)[None] for b in batches])
    for name, embed in embeddings.items():
        known = [gallery(left[r * USERS : (r + 1) * USERS], embed) for r in range(ROUNDS)]
        for way, pictures in made.items():
            likeness = torch.cat(
                [
                    similarity(pictures[r * USERS : (r + 1) * USERS, 0], known[r], embed)
                    if pictures.shape[1] == 1
                    else averaged(pictures[r * USERS : (r + 1) * USERS], known[r], embed)
                    for r in range(ROUNDS)
                ]
            )
            for k in (1, 3):
                told(f"{name}, rank {k}, {way}", reidentification(likeness, setting.users, k=k))
    if picture is not None:
        truth = torch.stack([b.inputs for b in batches])
        draw([truth[:12, :1], *(p[:12, :1] for p in made.values())], picture)


def averaged(pictures: Tensor, known: Tensor, embed: object) -> Tensor:
    """Likeness of whole claimed batches (n, b, *shape), mean over their pictures."""
    each = [similarity(p, known, embed).mean(0) for p in pictures]  # type: ignore[arg-type]
    return torch.stack(each)


def digits(defense: str, scratch: Path, picture: Path | None) -> None:
    """Which digit does a user write most? The network only tells odd from even, and so do labels.

    Twelve of a batch's sixteen digits are one, four are any; the prior is that of the public half.
    """
    raw = data.load("mnist")
    halves = divide(raw, 0)
    dataset = Dataset.of("odd or even", raw.images, raw.labels % 2, classes=2)
    kept = scratch / "digits.safetensors"
    prior = priors.load(kept if kept.exists() else priors.TRAINED["denoiser-mnist"])
    state = ModelState.of(models.build("convnet", dataset.spec, seed=0))
    favourite = torch.tensor([0, 2, 4, 6, 8, 1, 3, 5, 7, 9]).repeat(3)
    left = {d: halves.clients[raw.labels[halves.clients] == d] for d in range(10)}
    seen, batches, attributes = [], [], []
    for user, digit in enumerate(favourite.tolist()):
        stream = torch.Generator().manual_seed(derive(0, "client", user))
        other = halves.clients[-4 * (user + 1) :][:4]
        own = torch.cat([left[digit][12 * user :][:12], other])
        observation, truth = simulated(dataset, state, own, prior, stream, defense)
        seen.append(observation)
        batches.append(truth)
        attributes.append(raw.labels[own])
    public = halves.public[:5000]
    judge = models.train(models.build("convnet", raw.spec, seed=1), raw, public, steps=200, seed=1)
    print("judge's accuracy", models.accuracy(judge, raw, halves.clients[:2000]), flush=True)
    users = torch.arange(len(favourite))
    setting = Case(seen, batches, users, raw.batch(public).inputs, prior)
    short = [spec.replace("200", "100") for spec in ATTACKS[:2]]
    made = claims(setting, scratch / f"digits-{defense.replace(':', '-')}.safetensors", short)
    for way, pictures in made.items():
        if pictures.shape[1] == 1:
            found = attribute_inference(
                pictures[:, 0], users, majority(attributes), classifier(judge), chance=0.2
            )
            told(f"majority digit, {way}", found)
    if picture is not None:
        shown = torch.stack([b.inputs for b in batches])
        draw([shown[:10, :1], *(p[:10, :1] for p in made.values())], picture)


def trained(path: Path, public: Dataset) -> Prior:
    """The prior of public people, trained once."""
    if not path.exists():
        pictures = public.batch(torch.arange(len(public)))
        family = priors.build(PRIOR)
        network = priors.train(
            family, pictures, public.spec, seed=0, checkpoint=path.with_suffix(".training")
        )
        priors.save(network, path)
    return priors.load(path)


def simulated(
    dataset: Dataset,
    state: ModelState,
    own: Tensor,
    prior: Prior,
    stream: torch.Generator,
    defense: str,
) -> tuple[Observation, Batch]:
    """What the server sees of a client who trains on its examples `own`, and these."""
    scenario = gl.Scenario(
        dataset,
        state,
        defenses.build(defense)(gl.FedSGD()),
        gl.ThreatModel(GRANTED),
        batch_size=len(own),
        indices=own,
        prior=prior,
    )
    seen, truth = gl.simulate(scenario, generator=stream)
    return seen, truth.batch


def claims(case: Case, file: Path, wanted: Sequence[str]) -> dict[str, Tensor]:
    """Claims (n, 1 or b, *shape): of every attack, kept in `file`, and without an update."""
    known = safetensors.torch.load_file(file) if file.exists() else {}
    for spec in wanted:
        if spec in known:
            continue
        before = time.process_time()
        found = attacks.attack_all(attacks.build(spec), case.seen, seed=0)
        seconds = (time.process_time() - before) / len(found)
        print(f"{spec}: {seconds:.1f} CPU s an update", flush=True)
        pictures = torch.stack([c.batch.inputs for c in found]).float()
        known[spec] = pictures if spec.startswith("inverting") else pictures[:, :1].contiguous()
        safetensors.torch.save_file(known, file)
    count = len(case.seen)
    mean = case.public.mean(0)[None, None].expand(count, 1, *case.public.shape[1:])
    return known | {"public mean": mean, f"best of {SAMPLES} samples": best_samples(case)}


def best_samples(case: Case) -> Tensor:
    """Of the prior's samples the one whose gradient points most nearly along each update."""
    drawn = (
        case.prior.sample(SAMPLES, generator=torch.Generator().manual_seed(0)).float().clamp(0, 1)
    )
    state, client = case.seen[0].state, gl.FedSGD()
    received = F.normalize(torch.stack([flat(o.update.values) for o in case.seen]))
    labels = torch.stack([o.labels.mode().values for o in case.batches])
    chosen = torch.zeros(len(labels), dtype=torch.int64)
    for label in labels.unique():
        rows = torch.stack(
            [flat(client.mean(state, Batch(x[None], label[None])).values) for x in drawn]
        )
        mine = labels == label
        chosen[mine] = (received[mine] @ F.normalize(rows).T).argmax(1)
    return drawn[chosen][:, None]


def flat(values: object) -> Tensor:
    """All tensors of an update as one."""
    return torch.cat([v.flatten() for v in values.values()])  # type: ignore[attr-defined]


def told(name: str, found: UserRate) -> None:
    """A line of the table."""
    low, high, control = found.interval.low, found.interval.high, found.control_interval
    print(
        f"{name}: {found.rate:.2f} ({low:.2f} to {high:.2f}) control {found.control:.2f} "
        f"({control.low:.2f} to {control.high:.2f}) chance {found.chance:.2f} p {found.p:.1g} "
        f"excess from {found.excess.low:.2f}, n = {found.claims} of {found.users} users",
        flush=True,
    )


def draw(rows: Sequence[Tensor], path: Path) -> None:
    """A row of pictures (n, 1, c, h, w) per way."""
    strips = [torch.cat([x[0, 0] for x in row.float()], -1) for row in rows]
    levels = (torch.cat(strips, -2).clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(levels.numpy())
    image.resize((image.width * 2, image.height * 2), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]), Path(sys.argv[4]) if sys.argv[4:] else None)
