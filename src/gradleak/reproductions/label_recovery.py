"""Every rule of label recovery, by batch size, activation and training, beside the best guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gradleak import models
from gradleak.attacks.labels import LABEL_RULES, build
from gradleak.data import Dataset
from gradleak.errors import NotApplicable
from gradleak.mechanisms import FedSGD
from gradleak.metrics.baselines import guess_labels
from gradleak.models.convnet import convnet
from gradleak.models.seeding import seeded
from gradleak.reproductions.reproduction import Cell, Estimate, Reproduction, Request, Row
from gradleak.reproductions.sources import available, current, divide, substituted
from gradleak.run.jobs import derive
from gradleak.scenario import Scenario, simulate
from gradleak.threat import ThreatModel
from gradleak.types import Fact, ModelState

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "tanh": nn.Tanh,
    "GELU": nn.GELU,
}

_GUESS = "guess"


@dataclass(frozen=True)
class _Size:
    """How much work a budget buys.

    Attributes:
        data: data sets.
        activations: of the network.
        stages: training steps.
        batches: attacked per line.
    """

    data: tuple[str, ...]
    activations: tuple[str, ...]
    stages: tuple[int, ...]
    batches: int


_SIZES = {
    "quick": _Size(("mnist",), ("ReLU", "tanh"), (0, 100), batches=10),
    "full": _Size(("mnist", "cifar10"), tuple(_ACTIVATIONS), (0, 100, 1000), batches=40),
}

_BATCH_SIZES = (8, 64)


class LabelRecovery(Reproduction):
    """Cells: one network at one stage and one batch size, every rule on the same batches."""

    id = "label-recovery"
    title = "Label recovery against the best guess"
    paper = (
        "Zhao et al. 2020 (iDLG); Yin et al., CVPR 2021; Dang et al., NeurIPS 2021; Geng et al. "
        "2021; Wainakh et al., PoPETs 2022; Ma et al., ICLR 2023"
    )
    link = "https://openreview.net/forum?id=FIrQfNSOoTr"
    method = (
        "Random batches of private images, one gradient each, batch size granted, labels not. "
        "The score is the multiset overlap Σ_c min(claimed, true) / b; a rule that names classes "
        "only claims one of each. The guess is the multiset of largest expected overlap given the "
        "public class shares: what is told without any update. Networks are this package's "
        "convnet, trained on public images for the steps named. A rule that does not apply scores "
        "as the guess. Differences are paired by batch; intervals are Student's t over batches."
    )
    deviations = (
        "one network and two data sets of ten classes; the papers have others, and up to 1000 "
        "classes, where few rules meet a class twice",
    )

    def plan(self, request: Request) -> list[Cell]:
        size = _SIZES[request.budget]
        cells = []
        for wanted in size.data:
            name, dataset = available(wanted, request.data_dir)
            for activation in size.activations:
                for stage in size.stages:
                    for batch_size in _BATCH_SIZES:
                        content = {
                            "reproduction": self.id,
                            "data": name,
                            "fingerprint": dataset.fingerprint,
                            "activation": activation,
                            "stage": stage,
                            "batch_size": batch_size,
                            "batches": size.batches,
                            "seed": request.seed,
                        }
                        cells.append(Cell(content, trials=size.batches))
        return cells

    def run(
        self,
        cell: Mapping[str, Any],
        found: Sequence[Mapping[str, Any]],
        *,
        data_dir: str | None,
        progress: Callable[[float], None],
    ) -> dict[str, Any]:
        return recovered(cell, current(cell, data_dir), progress=progress)

    def rows(self, cells: Sequence[Cell], records: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        rows = []
        for cell in cells:
            content, record = cell.content, records[cell.key]
            table = (
                f"{content['data']}, {content['activation']}, batch {content['batch_size']}, "
                f"step {content['stage']}"
            )
            note = substituted(content["data"])
            guess = record["overlap"][_GUESS]
            rows.append(_row(table, _GUESS, "overlap", Estimate.mean(guess), "no update" + note))
            for name, values in record["overlap"].items():
                if name == _GUESS:
                    continue
                silent = record["silent"][name]
                told = f"; says nothing of {silent} of {len(values)} batches" if silent else ""
                claims = f"claims {LABEL_RULES[name].about.claims}{told}{note}"
                lift = Estimate.difference(values, guess)
                rows.append(_row(table, name, "overlap", Estimate.mean(values), claims))
                rows.append(_row(table, f"{name} − guess", "overlap_lift", lift, _word(lift)))
        return rows


def recovered(
    cell: Mapping[str, Any], dataset: Dataset, *, progress: Callable[[float], None]
) -> dict[str, Any]:
    """Overlap of every rule and of the guess, batch by batch, and where a rule says nothing."""
    division = divide(dataset, cell["seed"])
    state = _trained(cell["activation"], dataset, seed=cell["seed"], steps=cell["stage"])
    classes, size = dataset.spec.classes, cell["batch_size"]
    guessed = guess_labels(dataset.batch(division.public).labels, size, classes=classes)
    rules = [name for name, rule in LABEL_RULES.items() if rule.about.claims != "soft"]
    overlap: dict[str, list[float]] = {name: [] for name in (_GUESS, *rules)}
    silent = dict.fromkeys(rules, 0)
    for number in range(cell["batches"]):
        stream = torch.Generator().manual_seed(derive(cell["seed"], "batch", number))
        drawn = torch.randperm(len(division.clients), generator=stream)[:size]
        scenario = Scenario(
            data=dataset,
            model=state,
            mechanism=FedSGD(),
            threat=ThreatModel(knows=frozenset({Fact.MECHANISM, Fact.BATCH_SIZE})),
            batch_size=size,
            indices=division.clients[drawn],
        )
        seen, truth = simulate(scenario, generator=stream)
        true = truth.batch.labels.bincount(minlength=classes)
        guess = _overlap(guessed.bincount(minlength=classes), true)
        overlap[_GUESS].append(guess)
        for name in rules:
            own = torch.Generator().manual_seed(derive(cell["seed"], "rule", name, number))
            try:
                overlap[name].append(_overlap(build(name)(seen, generator=own), true))
            except NotApplicable:
                silent[name] += 1
                overlap[name].append(guess)
        progress((number + 1) / cell["batches"])
    return {"overlap": overlap, "silent": silent}


def _overlap(claimed: Tensor, true: Tensor) -> float:
    return float(torch.minimum(claimed, true).sum() / true.sum())


@lru_cache(maxsize=4)
def _trained(activation: str, dataset: Dataset, *, seed: int, steps: int) -> ModelState:
    """The broadcast state: from the seed and the public half alone."""
    with seeded(derive(seed, "model", activation)):
        model = convnet(dataset.spec, activation=_ACTIVATIONS[activation])
    public = divide(dataset, seed).public
    return models.train(model, dataset, public, steps=steps, seed=derive(seed, "training"))


def _row(table: str, line: str, metric: str, ours: Estimate, note: str) -> Row:
    return Row(row=f"{table} / {line}", metric=metric, unit="share", ours=ours, note=note)


def _word(lift: Estimate) -> str:
    assert lift.low is not None
    assert lift.high is not None
    if lift.low > 0:
        return "better than the guess"
    return "worse than the guess" if lift.high < 0 else "not told apart from the guess"
