"""The plan: groups, keys, controls of other clients."""

import dataclasses
from typing import Any

import pytest
import torch

from gradleak import data
from gradleak.errors import InvalidInput
from gradleak.run.jobs import JobSpec, attack_spec, defense_spec, derive, groups, plan
from gradleak.run.settings import AuditSettings
from gradleak.run.states import Broadcast
from gradleak.run.trial import _control, divide


def jobs(**given: Any) -> list[JobSpec]:
    settings = AuditSettings.of({"data": "digits", "attack": "dlg", "defense": "none"} | given)
    dataset = data.load("digits")
    states = {"init": Broadcast("tensors/state.safetensors", "digest")}
    return plan(settings, dataset, divide(dataset, settings.seed), states=states)


@pytest.mark.parametrize("targets", [1, 2, 7, 8, 9, 17, 64])
def test_groups_cover_the_targets_evenly(targets: int) -> None:
    made = groups(targets)
    assert [t for g in made for t in g] == list(range(targets))
    sizes = {len(g) for g in made}
    assert max(sizes) <= 8
    assert max(sizes) - min(sizes) <= 1


def test_a_key_depends_on_what_is_measured_and_on_nothing_else() -> None:
    (job,) = jobs(targets=2)
    same = dataclasses.replace(
        job, directory="elsewhere", prior_file="p", bounds_file="p", engine="vmap", data_dir="/data"
    )
    assert same.keyed().key == job.key
    for change in (
        {"seed": 1},
        {"state_digest": "other"},
        {"attack_spec": "dlg:steps=1"},
        {"defense_spec": "clip:norm=1.0"},
        {"data_fingerprint": "other"},
        {"targets": (0, 2)},
        {"knows": ("labels",)},
        {"prior": "pca:rank=1"},
        {"prior_digest": "other"},
        {"bounds_digest": "other"},
    ):
        assert dataclasses.replace(job, **change).keyed().key != job.key  # type: ignore[arg-type]
    assert JobSpec.from_json(job.to_json()) == job


def test_more_targets_keep_what_is_done() -> None:
    few = {job.key for job in jobs(targets=8)}
    assert few <= {job.key for job in jobs(targets=16)}


@pytest.mark.parametrize(("targets", "clients"), [(1, 1), (2, 2), (5, 1), (9, 9), (8, 3), (20, 2)])
def test_every_control_is_another_client(targets: int, clients: int) -> None:
    for job in jobs(targets=targets, clients=clients):
        owners = [*job.clients, -1] if job.spare is not None else list(job.clients)
        for i, owner in enumerate(job.clients):
            assert owners[_control(job, i)] != owner
        assert (job.spare is not None) == (len(set(job.clients)) == 1)


def test_too_many_targets_for_the_data() -> None:
    with pytest.raises(InvalidInput, match="need 4000 private examples: digits has 89"):
        jobs(targets=1000, batch_size=4)


def test_budgets_fill_only_what_is_not_given() -> None:
    quick, thorough = (attack_spec("dlg:steps=7", budget=b) for b in ("quick", "thorough"))
    assert "steps=7" in quick
    assert "steps=7" in thorough
    assert quick != thorough


def test_defenses_compose() -> None:
    ids, spec = defense_spec("clip:norm=2 + gaussian-noise")
    assert ids == "clip+gaussian-noise"
    assert spec == "clip:norm=2.0,scope=update+gaussian-noise:std=0.01,scope=update"


def test_every_protection_is_attacked_unaware_too_and_the_rest_stays_as_it_was() -> None:
    request = {"attack": ["dlg", "idlg"], "defense": ["none", "clip"], "targets": 2}
    usual, both = jobs(**request), jobs(**request, unaware=True)
    assert {j.key for j in usual} <= {j.key for j in both}
    added = [j for j in both if j not in usual]
    assert [j.finding.rpartition("/")[2] for j in added] == ["dlg (unaware)", "idlg (unaware)"]
    assert {j.defense for j in added} == {"clip"}
    assert {j.knows for j in added} == {("batch_size",)}
    with pytest.raises(InvalidInput, match="--unaware contradicts"):
        jobs(unaware=True, knows="no-mechanism")


def test_seeds_differ_by_use() -> None:
    made = {derive(0, *names) for names in (("model",), ("split",), ("client", 0), ("client", 1))}
    assert len(made) == 4
    for seed in made:
        torch.Generator().manual_seed(seed)
