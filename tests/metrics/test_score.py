from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradleak.metrics import mse, psnr_db, score, ssim
from gradleak.types import Batch, DataSpec

SPEC = DataSpec.image((1, 8, 8), 10)
BANK = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def scenario(seed: int, b: int) -> tuple[Batch, Batch]:
    generator = torch.Generator().manual_seed(seed)
    truth = BANK[torch.randperm(40, generator=generator)[:b]]
    labels = torch.randint(10, (b,), generator=generator)
    noise = 0.5 * torch.rand(b, 1, 8, 8, generator=generator)
    claim = Batch(truth + noise, torch.randint(10, (b,), generator=generator))
    return claim, Batch(truth, labels)


def shuffled(batch: Batch, order: torch.Tensor) -> Batch:
    return Batch(batch.inputs[order], batch.labels[order])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_the_order_of_neither_batch_matters(seed: int, b: int) -> None:
    claim, truth = scenario(seed, b)
    generator = torch.Generator().manual_seed(seed)
    order, other = (torch.randperm(b, generator=generator) for _ in range(2))
    plain = score(claim, truth, bank=BANK, spec=SPEC)
    mixed = score(shuffled(claim, other), shuffled(truth, order), bank=BANK, spec=SPEC)
    for name, values in plain.items():
        want = values if name == "label_accuracy" else [values[i] for i in order.tolist()]
        assert mixed[name] == pytest.approx(want), name
    for average in (mse, psnr_db, ssim):
        assert average(claim, truth) == pytest.approx(
            average(shuffled(claim, other), shuffled(truth, order))
        )


def test_without_alignment_the_order_would_matter() -> None:
    """Planted fault: comparing row by row is not invariant."""
    claim, truth = scenario(1, 4)
    row_by_row = (claim.inputs - truth.inputs).square().mean()
    rolled = (claim.inputs.roll(1, 0) - truth.inputs).square().mean()
    assert abs(float(row_by_row - rolled)) > 1e-2


def test_keys_sizes_and_exact_claim() -> None:
    _, truth = scenario(2, 3)
    scores = score(truth, truth, bank=BANK, spec=SPEC)
    assert scores == {
        "psnr_db": [200.0] * 3,
        "ssim": pytest.approx([1.0] * 3),
        "mse": [0.0] * 3,
        "identified": [1.0] * 3,
        "label_accuracy": [1.0],
    }


def test_a_missing_claim_stays_in_the_denominator() -> None:
    _, truth = scenario(3, 3)
    broken = truth.inputs.clone()
    broken[1] = math.nan
    scores = score(Batch(broken, truth.labels), truth, bank=BANK, spec=SPEC)
    assert scores["identified"] == [1.0, 0.0, 1.0]
    grey = -10 * math.log10(float((truth.inputs[1].double() - 0.5).square().mean()))
    assert scores["psnr_db"] == pytest.approx([200.0, grey, 200.0])
    short = score(Batch(truth.inputs[:1], truth.labels[:1]), truth, bank=BANK, spec=SPEC)
    assert short["identified"] == [1.0, 0.0, 0.0]


def test_a_missing_claim_never_identifies() -> None:
    grey = torch.full((1, 1, 8, 8), 0.5)
    truth = Batch(grey, torch.tensor([0]))
    nothing = Batch(torch.full_like(grey, math.nan), torch.tensor([0]))
    bank = torch.cat([grey, BANK])
    assert score(nothing, truth, bank=bank, spec=SPEC)["identified"] == [0.0]
    assert score(truth, truth, bank=bank, spec=SPEC)["identified"] == [1.0]


def test_rows_of_a_table_have_no_ssim() -> None:
    rows = torch.rand(5, 6, generator=torch.Generator().manual_seed(4))
    batch = Batch(rows[:2], torch.tensor([0, 1]))
    scores = score(batch, batch, bank=rows, spec=DataSpec("tabular", (6,), (0.0, 1.0), 2))
    assert set(scores) == {"psnr_db", "mse", "identified", "label_accuracy"}
