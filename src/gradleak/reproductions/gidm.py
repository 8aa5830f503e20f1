"""Gradient inversion of federated diffusion models, with and without the client's noise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gradleak import attacks, models, priors
from gradleak.attacks import attack_all
from gradleak.data import Dataset
from gradleak.errors import InvalidInput
from gradleak.mechanisms import Denoising
from gradleak.metrics.image import mse_each, psnr_each, ssim_each
from gradleak.priors import Denoiser
from gradleak.report.pictures import strip
from gradleak.reproductions.reproduction import Cell, Estimate, Reproduction, Request, Row
from gradleak.reproductions.sources import available, current, divide, substituted
from gradleak.run.jobs import derive
from gradleak.scenario import Scenario, simulate
from gradleak.threat import ThreatModel, Truth
from gradleak.types import Fact, ModelState, Observation

_FACTS = frozenset({Fact.MECHANISM, Fact.BATCH_SIZE, Fact.PRIOR})
_KNOWN = frozenset({Fact.TIMESTEPS, Fact.NOISE})
_GROUP = 4
_SHOWN = 6
"""Claims of a line that the page shows."""
_EARLY = "diffusion:steps=100,width=16,conditional=no"
_FITTED = {"olivetti": "diffusion:steps=500,batch_size=32,width=16,conditional=no,averaging=0.99"}
"""Priors that are trained when they are needed: no weights of faces come with the package."""
TARGETS = ("random", "early", "trained")


@dataclass(frozen=True)
class Line:
    """An attack of the table: its name there, its notation, and what it shows."""

    name: str
    spec: str
    note: str


KNOWN: tuple[Line, ...] = (
    Line("DLG-dm, Adam", "dlg-dm:optimiser=adam,steps=500", "pixels, squared distance"),
    Line("DLG-dm, L-BFGS", "dlg-dm", "the same, a better optimiser"),
    Line("InvG-dm", "invg-dm:steps=500", "pixels, cosine and total variation, signed Adam"),
    Line("GIDM, latent phase", "gidm:steps=0", "what the diffusion prior alone finds"),
    Line("GIDM", "gidm", "both phases"),
    Line("control: mean start", "mean-start", "the pixel phase from the public mean image"),
)
"""Attacks of a server that knows noise and times."""

PRIVATE: tuple[Line, ...] = (
    Line("GIDM+", "gidm-plus:denoised=0", "t in closed form; candidates share the update"),
    Line("GIDM+, prior", "gidm-plus", "the same with the diffusion prior"),
)
"""Attacks of a server that knows neither."""


@dataclass(frozen=True)
class Block:
    """Victims of one data set, attacked by every line."""

    data: str
    known: bool
    target: str
    time: int
    victims: int


def _blocks(budget: str) -> Iterator[Block]:
    if budget == "quick":
        yield Block("mnist", True, "random", 20, 2)
        yield Block("mnist", True, "trained", 300, 1)
        yield Block("mnist", False, "random", 50, 1)
        yield Block("mnist", False, "trained", 700, 1)
        return
    for data in ("mnist", "fashion-mnist", "cifar10"):
        yield Block(data, True, "random", 20, 16)
        yield Block(data, True, "early", 100, 6)
        for time in (20, 100, 300):
            yield Block(data, True, "trained", time, 6)
        for target in TARGETS[::2]:
            for time in (50, 150, 300, 500, 700, 900):
                yield Block(data, False, target, time, 6)
    yield Block("olivetti", True, "random", 20, 4)
    yield Block("olivetti", False, "random", 150, 2)


class Gidm(Reproduction):
    """Cells: a group of victims under one line of one block."""

    id = "gidm"
    title = "Gradient inversion of federated diffusion models"
    paper = (
        "Huang, Hong, Chen, Roos, GIDM: Gradient Inversion of Federated Diffusion Models, ARES 2025"
    )
    link = "https://arxiv.org/abs/2405.20380"
    method = (
        "One client takes the gradient of the denoising loss on one image (T = 1000, linear "
        "schedule, ε-prediction, the package's U-Net of 175 thousand weights), which the server "
        "inverts. Known: the server drew noise ε and step t itself. Private: the client drew them, "
        "and the attack is told neither. Targets are untrained (random), trained for 100 steps "
        "(early) or the trained network that comes with the package. The attacker's diffusion "
        "prior is another network, trained on public images (of faces, 64 pixels wide, for 500 "
        "steps when the table is computed); victims are private ones that neither network has "
        "seen; of faces the same people are in both halves. Every line of a table attacks the "
        "same victims. PSNR has peak 1 and claims are clamped to [0, 1] first; figures are "
        "medians, intervals are those of order statistics, and of fewer than six victims the range."
    )
    deviations = (
        "28 and 32 pixels wide and T = 1000 on small networks (published: up to 128 pixels, "
        "T = 16, 64 channels)",
        "the released GIDM+ starts from the true noise plus 1e-4 and never optimises t: here "
        "neither can be reached, t follows from the gradient of the time embedding in closed form",
        "the released code takes PSNR with peak 255 of images in [0, 1], which adds 48.13 dB; "
        "here the peak is 1",
        "L-BFGS in the pixels where the release runs 5001 steps of Adam; the published constants "
        "remain available as options of the attack",
        "figures of the paper's tables could not be read and are not compared",
    )

    positions = "time t of 1000"

    def plan(self, request: Request) -> list[Cell]:
        cells = []
        for block in _blocks(request.budget):
            found = _data(block.data, request.data_dir)
            if found is None:
                continue
            name, dataset = found
            for line in KNOWN if block.known else PRIVATE:
                for first in range(0, block.victims, _GROUP):
                    group = [first, min(first + _GROUP, block.victims)]
                    content = {
                        "reproduction": self.id,
                        "data": name,
                        "prior": block.data,
                        "fingerprint": dataset.fingerprint,
                        "known": block.known,
                        "target": block.target,
                        "time": block.time,
                        "line": line.name,
                        "attack": line.spec,
                        "group": group,
                        "seed": request.seed,
                    }
                    cells.append(Cell(content, trials=group[1] - group[0]))
        if not cells:
            raise InvalidInput("no data: expected mnist, or --data-dir")
        return cells

    def run(
        self,
        cell: Mapping[str, Any],
        found: Sequence[Mapping[str, Any]],
        *,
        data_dir: str | None,
        progress: Callable[[float], None],
    ) -> dict[str, Any]:
        return attacked(cell, current(cell, data_dir), progress=progress)

    def rows(self, cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        tables: dict[str, dict[tuple[str, int], dict[str, list[Any]]]] = {}
        for cell in cells:
            content, record = cell.content, records[cell.key]
            noise = "known" if content["known"] else "private"
            table = f"{content['data']}, {noise} noise, {content['target']} target"
            line = tables.setdefault(table, {}).setdefault((content["line"], content["time"]), {})
            for metric in ("psnr_db", "mse", "ssim", "mean_image"):
                line.setdefault(metric, []).extend(record[metric])
            spent = record["cpu_seconds"] / len(record["psnr_db"])
            line.setdefault("seconds", []).append(spent)
            for pictures in ("claims", "truths"):
                line.setdefault(pictures, []).append(record[pictures])
            line["words"] = [substituted(content["data"])]
        return [row for name, lines in tables.items() for row in _table(name, lines)]


def attacked(
    cell: Mapping[str, Any], dataset: Dataset, *, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Scores of every victim of the group, and pictures of the claims."""
    plays = _play(cell, dataset)
    claims = attack_all(
        attacks.build(cell["attack"]),
        [seen for seen, _ in plays],
        seed=derive(cell["seed"], "attack", *cell["group"]),
        engine="loop",
        progress=lambda done, total: progress(done / total),
    )
    truths = torch.cat([truth.batch.inputs for _, truth in plays])
    images = torch.cat([claim.batch.inputs for claim in claims])
    public = dataset.batch(divide(dataset, cell["seed"]).public).inputs
    guess = public.mean(0, keepdim=True).expand_as(truths)
    bounds = dataset.spec.bounds
    return {
        "psnr_db": psnr_each(images, truths, bounds).tolist(),
        "mse": mse_each(images, truths, bounds).tolist(),
        "ssim": ssim_each(images, truths, bounds).tolist(),
        "mean_image": psnr_each(guess, truths, bounds).tolist(),
        "claims": _picture(images),
        "truths": _picture(truths),
    }


def _picture(images: Tensor) -> str:
    return strip([image[None].float().numpy() for image in images[:_SHOWN]]).uri


def _play(cell: Mapping[str, Any], dataset: Dataset) -> list[tuple[Observation, Truth]]:
    """One client per victim; victim number k is the same under every line, target and time."""
    prior, target = _networks(cell["prior"], dataset)
    chosen = _victims(dataset, cell["prior"], cell["seed"])
    facts = _FACTS | (_KNOWN if cell["known"] else frozenset())
    plays = []
    for number in range(*cell["group"]):
        scenario = Scenario(
            data=dataset,
            model=_state(cell["target"], target, dataset, derive(cell["seed"], "model", number)),
            mechanism=Denoising(timestep=cell["time"]),
            threat=ThreatModel(facts),
            indices=chosen[number : number + 1],
            client=number,
            prior=prior,
        )
        stream = torch.Generator().manual_seed(derive(cell["seed"], "victim", number))
        plays.append(simulate(scenario, generator=stream))
    return plays


def _state(target: str, trained: Denoiser, dataset: Dataset, seed: int) -> ModelState:
    """The broadcast state in float64; of a random target one for every victim."""
    model = models.build("unet", dataset.spec, seed=seed)
    state = ModelState.of(model)
    if target != "random":
        found = trained if target == "trained" else _fitted(_EARLY, dataset)
        state = ModelState(model, dict(found.network), state.buffers)
    return state.to(torch.float64)


def _networks(data: str, dataset: Dataset) -> tuple[Denoiser, Denoiser]:
    """The attacker's prior, and the trained target: the same where no other comes along."""
    if data in _FITTED:
        return (_fitted(_FITTED[data], dataset),) * 2
    own = f"diffusion-{data}"
    target = _trained(f"denoiser-{data}")
    return _trained(own) if own in priors.TRAINED else target, target


@lru_cache(maxsize=8)
def _trained(name: str) -> Denoiser:
    found = priors.load(priors.TRAINED[name])
    assert isinstance(found, Denoiser)
    return found


@lru_cache(maxsize=2)
def _fitted(spec: str, dataset: Dataset) -> Denoiser:
    public = priors.prepared(dataset.batch(divide(dataset, 0).public), dataset.spec)
    found = priors.fit(spec, public, dataset.spec, seed=0)
    assert isinstance(found, Denoiser)
    return found


@lru_cache(maxsize=4)
def _victims(dataset: Dataset, prior: str, seed: int) -> Tensor:
    """Private examples that neither network was trained on, in random order."""
    clients = divide(dataset, seed).clients
    stream = torch.Generator().manual_seed(derive(seed, "victims"))
    order = clients[torch.randperm(len(clients), generator=stream)][:400]
    inputs = dataset.batch(order).inputs
    seen = torch.stack([network.seen(inputs) for network in _networks(prior, dataset)])
    return order[~seen.any(0)]


def _data(name: str, data_dir: str | None) -> tuple[str, Dataset] | None:
    """A data set whose networks come with the package; None where it is not on this machine."""
    try:
        found = available(name, data_dir)
    except (InvalidInput, KeyError):
        return None
    if name in _FITTED:
        return found
    return found if found[1].spec.shape == _trained(f"denoiser-{name}").data.shape else None


def _table(
    name: str, lines: Mapping[tuple[str, int], Mapping[str, Sequence[Any]]]
) -> Iterator[Row]:
    notes = {line.name: line.note for line in (*KNOWN, *PRIVATE)}
    times = sorted({time for _, time in lines})

    def row(line: str, time: int, values: Sequence[float], note: str, picture: str) -> Row:
        return Row(
            row=f"{name} / {line}" + (f", t = {time}" if len(times) > 1 else ""),
            metric="median_psnr_db",
            unit="dB",
            ours=Estimate.median(values),
            note=note,
            curve=(line, str(time)) if len(times) > 1 else None,
            picture=picture,
        )

    for time in times:
        own = {line: found for (line, at), found in lines.items() if at == time}
        first = next(iter(own.values()))
        yield row(
            "mean image",
            time,
            first["mean_image"],
            "costs no update; below, the truth",
            first["truths"][0],
        )
        for line, found in own.items():
            error, likeness = (statistics.median(found[m]) for m in ("mse", "ssim"))
            note = (
                f"{notes[line]}; MSE {error:.2g}, SSIM {likeness:.2f}, "
                f"{statistics.mean(found['seconds']):.0f} CPU s a victim{found['words'][0]}"
            )
            yield row(line, time, found["psnr_db"], note, found["claims"][0])
