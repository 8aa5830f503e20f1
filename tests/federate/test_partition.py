"""Divisions of a data set, schedules of a rate, and graphs of clients."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("flwr")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.errors import InvalidInput
from gradleak.federate.partition import Dirichlet, Iid, Partition
from gradleak.federate.schedule import Constant, Cosine, Step
from gradleak.federate.settings import TrainSettings
from gradleak.federate.topology import Gossip, connected, metropolis
from tests.laws.small import stream

LABELS = torch.arange(600) % 10


@pytest.mark.parametrize("rule", [Iid(), Dirichlet(alpha=0.1, minimum=7), Dirichlet(alpha=100)])
def test_parts_are_disjoint_and_cover_and_follow_the_seed(rule: Partition) -> None:
    parts = rule(LABELS, clients=12, generator=stream(1))
    assert torch.cat(parts).sort()[0].equal(torch.arange(600))
    again = rule(LABELS, clients=12, generator=stream(1))
    assert all(a.equal(b) for a, b in zip(parts, again, strict=True))
    other = rule(LABELS, clients=12, generator=stream(2))
    assert not all(a.equal(b) for a, b in zip(parts, other, strict=True))
    assert min(map(len, parts)) >= 7


def test_alpha_says_how_alike_clients_are() -> None:
    def largest_share(alpha: float) -> float:
        parts = Dirichlet(alpha=alpha, minimum=1)(LABELS, clients=10, generator=stream(0))
        counts = torch.stack([LABELS[p].bincount(minlength=10) for p in parts]).double()
        return float((counts.max(1)[0] / counts.sum(1)).mean())

    # Shares of Dir(α) have variance (1/10 · 9/10) / (10 α + 1): 0.0095 for 100, 0.3 for 0.01.
    assert largest_share(1000) < 0.15
    assert largest_share(0.01) > 0.6


def test_a_minimum_beyond_the_data_is_refused() -> None:
    with pytest.raises(InvalidInput, match="minimum=61"):
        Dirichlet(minimum=61)(LABELS, clients=10, generator=stream(0))


def test_schedules() -> None:
    assert [Constant()(r, 9) for r in (1, 9)] == [1, 1]
    assert [Step(every=2, factor=0.5)(r, 9) for r in (1, 2, 3, 5)] == [1, 1, 0.5, 0.25]
    cosine = Cosine(floor=0.1)
    assert cosine(1, 8) == 1
    assert math.isclose(cosine(5, 8), 0.55)
    assert cosine(8, 8) > 0.1


@given(
    nodes=st.integers(3, 17),
    degree=st.integers(2, 6),
    graph=st.sampled_from(["ring", "regular", "complete"]),
)
@settings(max_examples=60, deadline=None)
def test_graphs_are_what_their_names_say(nodes: int, degree: int, graph: str) -> None:
    rule = Gossip(graph=graph, degree=degree)  # type: ignore[arg-type]
    try:
        rule.check(nodes)
    except InvalidInput:
        assert graph == "regular"
        assert degree >= nodes or nodes * degree % 2
        return
    edges = rule.edges(nodes, seed=3)
    want = {"ring": 2, "regular": degree, "complete": nodes - 1}[graph]
    assert {len(ends) for ends in edges} == {want}
    assert all(i not in ends and all(i in edges[k] for k in ends) for i, ends in enumerate(edges))
    assert connected(edges)
    matrix = np.zeros((nodes, nodes))
    for i in range(nodes):
        for k, weight in metropolis(edges, i).items():
            matrix[i, k] = weight
    np.testing.assert_allclose(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(1), 1)
    second = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[-2] if nodes > 1 else 0
    assert second < 1 - 1e-9  # mixing alone brings everybody to the mean


def test_two_triangles_are_not_connected() -> None:
    assert not connected(((1, 2), (0, 2), (0, 1), (4, 5), (3, 5), (3, 4)))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fraction", 0, "--fraction 0.0"),
        ("partition", "dirichlet:-1", "alpha=-1.0"),
        ("partition", "dirichlets", "did you mean 'dirichlet'"),
        ("schedule", "cosine:floor=2", "floor=2.0"),
        ("mechanism", "fedavgg", "did you mean 'fedavg'"),
        ("mechanism", "vertical", "unknown mechanism"),
        ("topology", "gossip:graph=regular,degree=3", "degree=3"),
        ("min-clients", 11, "contradicts --clients 10"),
        ("rounds", 0, "rounds=0"),
        ("roundz", 1, "did you mean 'rounds'"),
        ("seed", "x", "--seed"),
    ],
)
def test_settings_that_make_no_sense_are_one_clear_line(
    name: str, value: object, words: str
) -> None:
    given = {"clients": 11} if name == "topology" else {}
    with pytest.raises(InvalidInput, match=words):
        TrainSettings.of({**given, name: value})


def test_settings_travel_as_a_flower_configuration() -> None:
    settings = TrainSettings(partition="dirichlet:0.3", draws=3, fraction=0.5)
    assert TrainSettings.of(settings.as_config()) == settings
    assert TrainSettings(partition="dirichlet:0.3").division == Dirichlet(alpha=0.3)
