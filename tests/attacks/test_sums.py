"""What sums of clients tell of one: exact inside the theory, and nothing just outside it."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

import gradleak as gl
from gradleak.attacks.active.imprint import Imprint
from gradleak.attacks.closed_form.differencing import difference, solvable
from gradleak.attacks.closed_form.lone_rows import LoneRows, repeated, written_alone
from gradleak.data import load
from gradleak.defenses import TopK
from gradleak.errors import InvalidInput
from gradleak.mechanisms.aggregate import mean, parts
from gradleak.models import build
from gradleak.types import Update
from tests.laws.small import TwoTwins, batch_of, state_of, stream

DIGITS = load("digits")


def flat(update: Update) -> Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


def in_row_space(weights: Tensor, client: int) -> bool:
    """By ranks: e_i adds nothing to the rows."""
    unit = torch.eye(weights.shape[1], dtype=weights.dtype)[client : client + 1]
    ranks = [torch.linalg.matrix_rank(w) for w in (weights, torch.cat([weights, unit]))]
    return bool(ranks[0] == ranks[1])


@pytest.mark.parametrize("seed", range(40))
def test_solvable_clients_are_those_in_the_row_space(seed: int) -> None:
    """And their updates are exact, to 1e-10 in float64; the others' are not."""
    draw = stream(seed)
    rounds, clients = (int(torch.randint(1, 8, (), generator=draw)) for _ in range(2))
    present = (torch.rand((rounds, clients), generator=draw) < 0.5).double()
    weights = present / present.sum(1, keepdim=True).clamp(min=1)
    updates = torch.randn((clients, 5), generator=draw, dtype=torch.float64)
    sums = [Update({"w": row}, "gradient") for row in weights @ updates]
    found = difference(sums, weights)
    for i in range(clients):
        assert bool(found.exact[i]) == bool(solvable(weights)[i]) == in_row_space(weights, i)
        gap = float((found.updates[i].values["w"] - updates[i]).norm())
        assert (gap < 1e-10) == bool(found.exact[i])


def test_two_sums_that_differ_in_one_client_give_it_away() -> None:
    """Everybody of four, and everybody but the last: only the last is exact."""
    weights = torch.tensor([[1 / 4] * 4, [1 / 3, 1 / 3, 1 / 3, 0]])
    assert solvable(weights).tolist() == [False, False, False, True]
    assert solvable(weights[:1]).tolist() == [False] * 4


def test_all_pairs_of_three_are_solvable_and_of_an_even_cycle_are_not() -> None:
    three = torch.tensor([[i in pair for i in range(3)] for pair in combinations(range(3), 2)])
    assert bool(solvable(three.double()).all())
    cycle = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]])
    assert not solvable(cycle.double()).any()


def test_noise_on_the_sums_grows_as_declared() -> None:
    """H0: Var of client i's error = (s ‖row i of W⁺‖)²; 20,000 draws each, 6 SE."""
    draw, std = stream(0), 0.3
    present = torch.rand((9, 4), generator=draw) < 0.5
    weights = present.double() / present.sum(1, keepdim=True).clamp(min=1)
    noise = std * torch.randn((9, 20_000), generator=draw, dtype=torch.float64)
    found = difference([Update({"w": row}, "gradient") for row in noise], weights)
    assert bool(found.exact.all())
    for i in range(4):
        measured = float(found.updates[i].values["w"].std())
        assert measured == pytest.approx(std * float(found.amplification[i]), rel=6 / 200)


def test_differencing_needs_a_sum_for_every_row() -> None:
    with pytest.raises(InvalidInput, match="2 sums"):
        difference([Update({"w": torch.zeros(1)}, "gradient")] * 2, torch.ones(3, 4))


def test_clients_of_a_real_model_come_back_from_sums() -> None:
    state, batch = state_of(TwoTwins), batch_of(4)
    each = [gl.FedSGD().mean(state, part) for part in parts(batch, 4)]
    weights = torch.tensor([[1 / 2, 1 / 2, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [1 / 4] * 4])
    sums = [mean(each[:k]) for k in (2, 3, 4)]
    found = difference(sums, weights.double())
    assert found.exact.tolist() == [False, False, True, True]
    for i in (2, 3):
        torch.testing.assert_close(flat(found.updates[i]), flat(each[i]), rtol=0, atol=1e-7)


def test_coordinates_that_one_client_wrote_are_its_own() -> None:
    state, clients = state_of(TwoTwins), 5
    sent = [TopK(0.2)(gl.FedSGD()).mean(state, part) for part in parts(batch_of(5), clients)]
    total = mean(sent)
    owners = written_alone({k: torch.stack([u.values[k] != 0 for u in sent]) for k in state.params})
    seen = 0
    for name, owner in owners.items():
        for i in range(clients):
            own = owner == i
            seen += int(own.sum())
            torch.testing.assert_close(
                clients * total.values[name][own], sent[i].values[name][own], rtol=1e-14, atol=0
            )
        several = torch.stack([u.values[name] != 0 for u in sent]).sum(0)
        assert bool(((owner == -1) == (several != 1)).all())
    assert seen > 0


def test_repeated_ratios_are_found_and_mixtures_are_not() -> None:
    inputs = torch.rand((3, 20), generator=stream(0), dtype=torch.float64)
    errors = torch.zeros((8, 3), dtype=torch.float64)
    errors[[0, 1, 2], 0] = torch.tensor([0.5, -2.0, 1e-4], dtype=torch.float64)  # one's own
    errors[3:7, 1:] = torch.randn((4, 2), generator=stream(1), dtype=torch.float64)  # mixtures
    errors[7, 2] = 1.0  # a single unit: not told from a mixture
    found = repeated(errors @ inputs, errors.sum(1), tolerance=1e-12)
    torch.testing.assert_close(found, inputs[:1], rtol=1e-12, atol=1e-12)
    nothing = repeated(errors[3:] @ inputs, errors[3:].sum(1), tolerance=1e-12)
    assert nothing.shape == (0, 20)


def observed(
    clients: int, mechanism: gl.FedSGD | gl.FedAvg, *, attack: Imprint | None = None
) -> tuple[gl.Observation, Tensor]:
    state = gl.ModelState.of(build("mlp", DIGITS.spec, seed=2))
    if attack is not None:
        public = DIGITS.batch(torch.arange(1000, 1700))
        state = attack.plant(
            state, public, data=DIGITS.spec, batch_size=clients, generator=stream(0)
        )
    scenario = gl.Scenario(
        DIGITS,
        state,
        mechanism,
        threat=gl.ThreatModel(view="aggregate", server="malicious" if attack else "honest"),
        clients=clients,
        indices=torch.arange(clients),
    )
    seen, truth = gl.simulate(scenario, generator=stream(0))
    return seen, truth.batch.inputs


def exact(claim: Tensor, truth: Tensor) -> int:
    """How many private images are claimed to within 1e-4."""
    near = torch.cdist(truth.flatten(1).double(), claim.flatten(1).double())
    return int((near.min(1).values < 1e-4 * truth[0].numel() ** 0.5).sum())


@pytest.mark.parametrize("mechanism", [gl.FedSGD(), gl.FedAvg(steps=3)], ids=["sgd", "avg"])
def test_lone_rows_reads_examples_out_of_a_sum(mechanism: gl.FedSGD | gl.FedAvg) -> None:
    """Four clients: every example, after local steps as well."""
    seen, truth = observed(4, mechanism)
    claim = LoneRows()(seen, generator=stream(0))
    assert claim.status == "solved"
    assert exact(claim.batch.inputs, truth) == 4


def test_lone_rows_of_a_large_sum_finds_nothing_and_says_so() -> None:
    """64 clients leave no unit to one of them."""
    claim = LoneRows()(observed(64, gl.FedSGD())[0], generator=stream(0))
    assert claim.status == "no_solution"
    assert claim.message.startswith("0 of 64")


def test_an_imprint_reads_examples_out_of_a_sum() -> None:
    """16 clients, one example each, 256 bins: (255/256)^15 = 94 % are expected alone."""
    attack = Imprint()
    seen, truth = observed(16, gl.FedSGD(), attack=attack)
    assert exact(attack(seen, generator=stream(0)).batch.inputs, truth) >= 12
