"""The published evaluation of gradient slices, with real federated training and its breakers."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gradleak import defenses, metrics, models
from gradleak.attacks import attack_all
from gradleak.attacks.recipes.blind_mask import BlindMask
from gradleak.attacks.recipes.dlg import DLG
from gradleak.attacks.recipes.inverting_gradients import InvertingGradients
from gradleak.data import Dataset
from gradleak.defenses import Memory, advanced, compensated
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedSGD
from gradleak.reproductions.reproduction import Cell, Estimate, Reproduction, Request, Row
from gradleak.reproductions.sources import available, current, divide, substituted
from gradleak.run.jobs import derive
from gradleak.run.replies import told
from gradleak.scenario import Scenario, simulate
from gradleak.threat import ThreatModel, Truth
from gradleak.types import Attack, Batch, Fact, Mechanism, ModelState, Observation, Update

HIDDEN_DB = 10.5
"""The published protections bring both attacks to this PSNR or below; muted Soteria does not."""
POINTS = 2.0
"""Accuracies lost agree within so many points, and round-time overheads within 5 points."""

_TRAINED = 10.0
"""Points within which no protection must come to the paper's, for losses to be compared."""

CLIENTS, BATCH_SIZE, RATE = 10, 32, 0.2
_WARM_UP = 2

_STD = 0.2
_SLICES = f"gradient-slices:std={_STD},mode=as-published"
_CORRECTED = f"gradient-slices:std={_STD},mode=corrected"

PROTECTIONS: Mapping[str, str] = {
    "none": "none",
    "slices": _SLICES,
    "GC": "top-k:fraction=0.1,scope=tensor",
    "DP-G": f"gaussian-noise:std={_STD}",
    "DP-L": f"laplace-noise:std={_STD}",
    "Soteria": "soteria:prune_rate=50",
    "slices, corrected": _CORRECTED,
}
"""What clients do, by the name that the published tables give it, and our corrected slices."""

_SLOW = frozenset({"Soteria"})
"""Their clients take hundreds of times as long: they train a fifth of the rounds with a sixteenth
of the examples, and are timed twice."""
_SLOW_TIMED = 2


@dataclass(frozen=True)
class Line:
    """One line of a table of attacks.

    Attributes:
        protection: of `PROTECTIONS`.
        aware: whether the server knows the client's protection.
        note: what the line shows.
    """

    protection: str
    aware: bool
    note: str


LINES: Mapping[str, Line] = {
    "none": Line("none", False, "no protection"),
    "slices": Line("slices", False, "unaware, as published"),
    "GC": Line("GC", False, "unaware, as published"),
    "DP-G": Line("DP-G", False, "noise without clipping: no differential privacy"),
    "DP-L": Line("DP-L", False, "noise without clipping: no differential privacy"),
    "Soteria": Line("Soteria", False, "unaware, as published"),
    "Soteria, muted": Line("Soteria", True, "the silent columns muted"),
    "slices, blind mask": Line("slices", True, "adaptive: not in the paper"),
    "slices, corrected, blind mask": Line("slices, corrected", True, "adaptive: not in the paper"),
    "GC, support known": Line("GC", True, "adaptive: not in the paper"),
}

ATTACKS: Mapping[str, Literal["dlg", "inverting-gradients"]] = {
    "DLG": "dlg",
    "IG": "inverting-gradients",
}


class Published(dict[str, tuple[float | None, float | None, float | None, float | None]]):
    """PSNR in dB, SSIM, accuracy and round-time overhead in per cent, by line."""


_SOURCE = "slides of the authors' talk at INFOCOM 2022"


def _published(none: float, *lines: str) -> Published:
    """One published table: accuracy without protection, then slices, GC, DP-G, DP-L, Soteria."""
    table = Published(none=(None, None, none, None))
    for text in lines:
        name, *figures = text.split("|")
        psnr, ssim, accuracy, overhead = (float(f) if f else None for f in figures)
        table[name] = (psnr, ssim, accuracy, overhead)
    return table


PUBLISHED: Mapping[tuple[str, str], Published] = {
    ("mnist", "DLG"): _published(
        91.69,
        "slices|9.41|.046|90.43|8.45",
        "GC|9.52|.051|36.52|4.63",
        "DP-G|9.36|.041|10.37|3.91",
        "DP-L|9.39|.043|10.21|3.74",
        "Soteria|9.57|.053|87.77|14.52",
        "Soteria, muted|18.49|.64||",
    ),
    ("fashion-mnist", "DLG"): _published(
        91.80,
        "slices|9.66|.073|89.29|8.11",
        "GC|9.83|.077|33.11|3.75",
        "DP-G|9.57|.071|10.10|3.89",
        "DP-L|9.62|.065|9.98|4.04",
        "Soteria|9.89|.082|86.35|13.20",
        "Soteria, muted|19.78|.84||",
    ),
    ("cifar10", "DLG"): _published(
        54.15,
        "slices|9.61|.025|52.47|8.97",
        "GC|9.79|.026|29.84|3.58",
        "DP-G|9.55|.023|10.19|4.03",
        "DP-L|9.52|.024|10.00|4.31",
        "Soteria|9.88|.029|49.91|14.09",
        "Soteria, muted|24.48|.88||",
    ),
    ("mnist", "IG"): _published(
        88.14,
        "slices|9.83|.049|86.87|9.07",
        "GC|10.01|.051|32.29|4.90",
        "DP-G|9.66|.044|10.46|3.84",
        "DP-L|9.59|.046|9.85|3.66",
        "Soteria|10.43|.057|84.09|16.12",
        "Soteria, muted|19.61|.73||",
    ),
    ("fashion-mnist", "IG"): _published(
        86.57,
        "slices|9.91|.075|84.65|8.62",
        "GC|9.98|.083|30.38|4.23",
        "DP-G|9.74|.068|9.86|4.14",
        "DP-L|9.80|.067|9.77|3.99",
        "Soteria|10.14|.089|81.10|15.86",
        "Soteria, muted|21.23|.95||",
    ),
    ("cifar10", "IG"): _published(
        49.31,
        "slices|10.11|.041|47.73|9.33",
        "GC|10.32|.042|23.35|4.08",
        "DP-G|9.95|.030|10.01|4.15",
        "DP-L|9.86|.034|10.16|4.02",
        "Soteria|10.79|.044|45.16|16.43",
        "Soteria, muted|27.04|.93||",
    ),
}


@dataclass(frozen=True)
class _Size:
    """How much work a budget buys.

    Attributes:
        data: data sets attacked, and those that training uses in their place.
        targets: images attacked per line.
        group: images that a cell attacks side by side.
        steps: of DLG and of IG.
        rounds: of federated training; 0 trains nothing.
        timed: interleaved rounds that the overhead is the median of.
    """

    data: Mapping[str, str]
    targets: int
    group: int
    steps: Mapping[str, int]
    rounds: int
    timed: int


_SIZES = {
    "quick": _Size(
        {"mnist": "mnist"},
        targets=4,
        group=2,
        steps={"DLG": 200, "IG": 300},
        rounds=100,
        timed=5,
    ),
    "full": _Size(
        {"mnist": "mnist", "fashion-mnist": "fashion-mnist", "cifar10": "cifar10-jpeg"},
        targets=8,
        group=4,
        steps={"DLG": 300, "IG": 1000},
        rounds=1000,
        timed=20,
    ),
}


class GradientSlices(Reproduction):
    """Cells: train under one protection; time all of them; attack a group of images."""

    id = "gradient-slices"
    title = "Random perturbation of gradient slices: leakage, accuracy and time"
    paper = (
        "Wang, Guo, Xie, Qi, Protect Privacy from Gradient Leakage Attack in Federated Learning, "
        "IEEE INFOCOM 2022, both tables"
    )
    link = "https://github.com/wangjunxiao/GradDefense"
    method = (
        f"{CLIENTS} clients train DLG's LeNet by FedSGD on Flower, each with {BATCH_SIZE} examples "
        "per round, on even parts of one half of the data; accuracy is that on the other half. "
        "Attacks see the gradient of one private image at the untrained network; unaware ones "
        "believe in an unprotected client, adaptive ones know the protection but not what it drew. "
        "DLG searches the label too; IG knows it. Every line attacks the same images. Overhead is "
        "the CPU time of a round of all clients and the server over that without protection, "
        "rounds of all protections interleaved, one thread. A PSNR agrees when both figures lie on "
        f"the same side of {HIDDEN_DB:g} dB, asked only where the attack passes it without "
        "protection; an accuracy when both lose as much against no "
        f"protection, to {POINTS:g} points, asked only where no protection comes within "
        f"{_TRAINED:g} of the paper's; an overhead to 5 points. Intervals are Student's t."
    )
    deviations = (
        f"noise of standard deviation {_STD}, as the published tables do not say theirs (the "
        "released code defaults to 0.0005, which hides nothing here); the same for all noise",
        "gradient compression keeps 10 % of every tensor and Soteria masks 50 % of the features: "
        "the tables do not say their shares",
        "images as they are (published code: enlarged to 32×32, three channels)",
        "CIFAR-10 trains on the 10000 images at hand, which were JPEG, and attacks lossless ones",
        "DLG takes 300 steps of L-BFGS in float64 with 4 restarts, IG 1000 of 4800 signed steps",
        "Soteria trains for a fifth of the rounds with a sixteenth of the examples, beside a "
        "control that does too: its clients take hundreds of times as long",
        "one gradient per round (FedSGD); rounds, rate and number of clients of the published "
        "tables are unknown",
    )

    def plan(self, request: Request) -> list[Cell]:
        if importlib.util.find_spec("flwr") is None:
            raise InvalidInput("federated training needs Flower: pip install 'gradleak[federate]'")
        size = _SIZES[request.budget]
        cells = []
        for wanted, trained in size.data.items():
            name, dataset = available(wanted, request.data_dir)
            shared = {
                "reproduction": self.id,
                "table": wanted,
                "data": name,
                "fingerprint": dataset.fingerprint,
                "seed": request.seed,
            }
            cells.append(Cell(shared | {"part": "time", "rounds": size.timed}, trials=20))
            for line, settings in LINES.items():
                for attack in ATTACKS:
                    for first in range(0, size.targets, size.group):
                        last = min(first + size.group, size.targets)
                        content = {
                            "part": "attack",
                            "line": line,
                            "defense": PROTECTIONS[settings.protection],
                            "aware": settings.aware,
                            "attack": attack,
                            "steps": size.steps[attack],
                            "group": [first, last],
                        }
                        cells.append(Cell(shared | content, trials=last - first))
            name, dataset = available(trained, request.data_dir)
            shared |= {"data": name, "fingerprint": dataset.fingerprint}
            for content in _trainings(size.rounds):
                cells.append(
                    Cell(shared | {"part": "train", **content}, trials=max(1, size.rounds // 10))
                )
        return cells

    def run(
        self,
        cell: Mapping[str, Any],
        found: Sequence[Mapping[str, Any]],
        *,
        data_dir: str | None,
        progress: Callable[[float], None],
    ) -> dict[str, Any]:
        dataset = current(cell, data_dir)
        if cell["part"] == "train":
            return trained(cell, data_dir=data_dir, progress=progress)
        part = {"time": timed, "attack": attacked}[cell["part"]]
        return part(cell, dataset, progress=progress)

    def rows(self, cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        tables = list(dict.fromkeys(cell.content["table"] for cell in cells))
        rows = []
        for table in tables:
            own = [cell for cell in cells if cell.content["table"] == table]
            rows += _attack_rows(table, _pick(own, records, "attack"))
            rows += _cost_rows(table, _pick(own, records, "train"), _pick(own, records, "time"))
        return rows


def _training(protection: str, rounds: int) -> dict[str, int]:
    """How a protection is trained, and its control with it."""
    if protection in _SLOW:
        return {"rounds": max(1, rounds // 5), "batch_size": BATCH_SIZE // 16}
    return {"rounds": rounds, "batch_size": BATCH_SIZE}


def _trainings(rounds: int) -> list[dict[str, Any]]:
    """What is trained, each beside its control."""
    wanted = [
        {"defense": defense, **_training(name, rounds)}
        for name, spec in PROTECTIONS.items()
        for defense in ("none", spec)
    ]
    return [each for i, each in enumerate(wanted) if each not in wanted[:i]]


_Found = list[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _pick(cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]], part: str) -> _Found:
    """(content, record) of every cell of one part."""
    return [(c.content, records[c.key]) for c in cells if c.content["part"] == part]


def _attack_rows(table: str, found: _Found) -> list[Row]:
    """PSNR and SSIM of every line under both attacks, differences, and the guess."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for content, record in found:
        place = scores.setdefault((content["attack"], content["line"]), {})
        for name in ("psnr_db", "ssim", "guess"):
            place.setdefault(name, []).extend(record[name])
    stands = substituted(found[0][0]["data"])
    rows = []
    for (attack, line), measured in scores.items():
        paper = PUBLISHED[table, attack].get(line, (None,) * 4)
        psnr, ssim = Estimate.mean(measured["psnr_db"]), Estimate.mean(measured["ssim"])
        seen = Estimate.mean(scores[attack, "none"]["psnr_db"]).low
        assert seen is not None
        works = seen > HIDDEN_DB
        same = _same_side(psnr, paper[0]) if works and paper[0] is not None else None
        note = LINES[line].note + ("" if works else ", the attack fails without it too") + stands
        rows += [
            Row(
                row=f"{table}, {attack} / {line}",
                metric=metric,
                unit=unit,
                ours=ours,
                paper=figure,
                paper_source=_source(figure),
                agrees=same if metric == "psnr_db" else None,
                note=note,
            )
            for metric, unit, ours, figure in (
                ("psnr_db", "dB", psnr, paper[0]),
                ("ssim", "", ssim, paper[1]),
            )
        ]
        if line != "none":
            gap = Estimate.difference(measured["psnr_db"], scores[attack, "none"]["psnr_db"])
            rows.append(
                Row(
                    row=f"{table}, {attack} / {line} − none",
                    metric="psnr_db_gain",
                    unit="dB",
                    ours=gap,
                    note=note,
                )
            )
    for attack in ATTACKS:
        guess = Estimate.mean(scores[attack, "none"]["guess"])
        row = f"{table}, {attack} / best guess without an update"
        rows.append(Row(row=row, metric="psnr_db", unit="dB", ours=guess, note="costs no update"))
    return rows


def _cost_rows(table: str, trainings: _Found, timings: _Found) -> list[Row]:
    """Accuracy of every protection, what it loses, and what a round takes more."""
    accuracy = {
        (c["defense"], c["rounds"], c["batch_size"]): 100 * r["accuracy"] for c, r in trainings
    }
    most = max(c["rounds"] for c, _ in trainings)
    tests = trainings[0][1]["test_examples"]
    ((_, timing),) = timings
    plain = timing["seconds"]["none"]
    rows = []
    for name, spec in PROTECTIONS.items():
        paper = PUBLISHED[table, "DLG"].get(name, (None,) * 4)
        rounds, batch_size = _training(name, most).values()
        own, control = (accuracy[d, rounds, batch_size] for d in (spec, "none"))
        lost = control - own
        note = f"{rounds} rounds of {batch_size} examples on {trainings[0][0]['data']}"
        agrees = None
        if paper[2] is not None and name != "none":
            undefended = float(PUBLISHED[table, "DLG"]["none"][2] or 0)
            theirs = undefended - paper[2]
            if control >= undefended - _TRAINED:
                agrees = abs(lost - theirs) <= POINTS
            note = f"loses {lost:.1f} points (paper: {theirs:.1f}) in " + note
        rows.append(
            Row(
                row=f"{table}, cost / {name}",
                metric="accuracy",
                unit="%",
                ours=_share(own / 100, tests),
                paper=paper[2],
                paper_source=_source(paper[2]),
                agrees=agrees,
                note=note,
            )
        )
        if name == "none":
            continue
        more = [100 * (a / b - 1) for a, b in zip(timing["seconds"][spec], plain)]
        overhead = Estimate.mean(more)
        agrees = None if paper[3] is None else abs(float(overhead.value or 0) - paper[3]) <= 5
        rows.append(
            Row(
                row=f"{table}, cost / {name}",
                metric="round_time_overhead",
                unit="%",
                ours=overhead,
                paper=paper[3],
                paper_source=_source(paper[3]),
                agrees=agrees,
                note="CPU time of all clients and the server, over no protection",
            )
        )
    return rows


def _source(figure: float | None) -> str:
    return "unverified" if figure is None else _SOURCE


def _same_side(ours: Estimate, paper: float) -> bool | None:
    """Whether both say hidden, or both say seen; None where our interval reaches across."""
    assert ours.low is not None
    assert ours.high is not None
    if ours.low <= HIDDEN_DB < ours.high:
        return None
    return (ours.high <= HIDDEN_DB) == (paper <= HIDDEN_DB)


def _share(accuracy: float, n: int) -> Estimate:
    """An accuracy in per cent over n test examples."""
    interval = metrics.wilson(round(accuracy * n), n)
    bounds = (100 * interval.low, 100 * interval.high)
    return Estimate(100 * accuracy, *bounds, interval.confidence, n)


def trained(
    cell: Mapping[str, Any], *, data_dir: str | None, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Accuracy after federated training under one protection, and along it."""
    from gradleak.federate.settings import TrainSettings
    from gradleak.federate.training import train

    settings = TrainSettings(
        data=cell["data"],
        data_dir=data_dir,
        defense=cell["defense"],
        clients=CLIENTS,
        rounds=cell["rounds"],
        batch_size=cell["batch_size"],
        learning_rate=RATE,
        schedule="cosine",
        test_examples=200,
        seed=cell["seed"],
        draws=derive(cell["seed"], "draws"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        record = train(settings, out=Path(scratch) / "run", watcher=_Told(progress))
    return {
        "accuracy": record["accuracy"],
        "test_examples": record["test_examples"],
        "curve": [each["accuracy"] for each in record["rounds"]],
        "client_seconds": statistics.median(each["client_seconds"] for each in record["rounds"]),
    }


@dataclass(frozen=True)
class _Told:
    """Passes on how far a training is."""

    progress: Callable[[float], None]

    def running(self, done: float, *, total: int, resumed: int) -> None:
        self.progress(done / total)


def attacked(
    cell: Mapping[str, Any], dataset: Dataset, *, progress: Callable[[float], None]
) -> dict[str, Any]:
    """PSNR and SSIM of every claim of the group, and PSNR of the best guess without an update."""
    plays = _play(cell, dataset)
    attack: Attack
    if cell["line"].endswith("blind mask"):
        attack = BlindMask(ATTACKS[cell["attack"]], steps=cell["steps"])
    elif cell["attack"] == "DLG":
        attack = DLG(steps=cell["steps"])
    else:
        attack = InvertingGradients(steps=cell["steps"])
    claims = attack_all(
        attack,
        [seen for seen, _ in plays],
        seed=derive(cell["seed"], "attack", *cell["group"]),
        progress=lambda done, total: progress(done / total),
    )
    public = dataset.batch(divide(dataset, cell["seed"]).public)
    known = cell["attack"] == "IG"
    scores: dict[str, list[float]] = {"psnr_db": [], "ssim": [], "guess": []}
    for claim, (_, truth) in zip(claims, plays, strict=True):
        guesses = metrics.baselines(public, truth.batch, labels_known=known, spec=dataset.spec)
        guess = guesses.get("class_mean", guesses["mean_image"])
        scores["psnr_db"].append(metrics.psnr_db(claim.batch, truth.batch))
        scores["ssim"].append(metrics.ssim(claim.batch, truth.batch))
        scores["guess"].append(metrics.psnr_db(guess, truth.batch))
    return scores


def _play(cell: Mapping[str, Any], dataset: Dataset) -> list[tuple[Observation, Truth]]:
    """One private image per client; client k has the same under every line."""
    facts = {Fact.BATCH_SIZE}
    facts |= {Fact.LABELS} if cell["attack"] == "IG" else set()
    facts |= {Fact.MECHANISM} if cell["aware"] else set()
    clients = divide(dataset, cell["seed"]).clients
    plays = []
    for number in range(*cell["group"]):
        scenario = Scenario(
            data=dataset,
            model=_initial(cell, dataset),
            mechanism=_client(cell, dataset),
            threat=ThreatModel(knows=frozenset(facts)),
            indices=clients[number : number + 1],
        )
        stream = torch.Generator().manual_seed(derive(cell["seed"], "client", number))
        plays.append(simulate(scenario, generator=stream))
    return plays


def _initial(cell: Mapping[str, Any], dataset: Dataset) -> ModelState:
    seed = derive(cell["seed"], "model")
    return ModelState.of(models.build("lenet", dataset.spec, seed=seed))


def _client(cell: Mapping[str, Any], dataset: Dataset) -> Mechanism:
    client = defenses.build(cell["defense"])(FedSGD())
    return told(client, dataset, divide(dataset, cell["seed"]).public)


def timed(
    cell: Mapping[str, Any], dataset: Dataset, *, progress: Callable[[float], None]
) -> dict[str, Any]:
    """CPU seconds of rounds of all clients and of the server, protections interleaved."""
    crowd = {spec: _client({**cell, "defense": spec}, dataset) for spec in PROTECTIONS.values()}
    states = dict.fromkeys(crowd, _initial(cell, dataset))
    memories: dict[str, list[Memory]] = {spec: [{} for _ in range(CLIENTS)] for spec in crowd}
    seconds: dict[str, list[float]] = {spec: [] for spec in crowd}
    order = divide(dataset, cell["seed"]).clients
    for number in range(cell["rounds"] + _WARM_UP):
        batches = [
            dataset.batch(each) for each in torch.split(order.roll(-number), BATCH_SIZE)[:CLIENTS]
        ]
        for name, spec in PROTECTIONS.items():
            if name in _SLOW and not _WARM_UP <= number < _WARM_UP + _SLOW_TIMED:
                continue
            started = time.process_time()
            states[spec] = _round(crowd[spec], states[spec], batches, memories[spec], seed=number)
            if number >= _WARM_UP:
                seconds[spec].append(time.process_time() - started)
        progress((number + 1) / (cell["rounds"] + _WARM_UP))
    return {"seconds": seconds}


@torch.no_grad()
def _round(
    client: Mechanism,
    state: ModelState,
    batches: Sequence[Batch],
    memories: list[Memory],
    *,
    seed: int,
) -> ModelState:
    """Let every client send its update, and the server apply their mean."""
    total: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        stream = torch.Generator().manual_seed(derive(seed, "client", number))
        sent, memories[number] = advanced(client, state, batch, memories[number], generator=stream)
        total = {k: v + total[k] if total else v for k, v in sent.values.items()}
    mean = Update({k: v / len(batches) for k, v in total.items()}, "gradient")
    step = compensated(client, mean, clients=len(batches)).values
    return replace(state, params={k: p - RATE * step[k] for k, p in state.params.items()})
