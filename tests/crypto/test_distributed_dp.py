"""Clipping, rotation, rounding, noise and the bound on it, and the protocol that wraps another."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special
from scipy.linalg import hadamard

import gradleak.crypto
from gradleak.crypto import Terms, build
from gradleak.crypto.distributed_dp import DistributedDP, DistributedNoise, Noise
from gradleak.crypto.encoding import fits
from gradleak.crypto.rehearsal import rehearse, terms_for
from gradleak.crypto.rotation import block, rotate, undo
from gradleak.errors import InvalidInput
from tests.crypto.plain import Plain

SEED = bytes(range(32))
NOISES: list[Noise] = ["skellam", "discrete-gaussian"]


def vectors(clients: int, length: int) -> dict[int, np.ndarray]:
    made = np.random.default_rng(length).normal(size=(clients, length))
    return {n: row / np.linalg.norm(row) for n, row in enumerate(made)}


@pytest.mark.parametrize("length", [1, 2, 3, 8, 37, 200])
def test_rotations_keep_lengths_and_can_be_undone(length: int) -> None:
    matrix = np.stack([rotate(row, SEED) for row in np.eye(length)])
    assert np.allclose(matrix @ matrix.T, np.eye(length), atol=1e-12)
    vector = np.random.default_rng(0).normal(size=length)
    assert np.allclose(undo(rotate(vector, SEED), SEED), vector, atol=1e-12)


def test_a_power_of_two_is_one_hadamard_transform() -> None:
    matrix = np.stack([rotate(row, SEED) for row in np.eye(16)]).T * 4
    signs = matrix[0]
    assert set(np.unique(np.abs(matrix))) == {1.0}
    rows = {tuple(row) for row in (matrix * signs).astype(int)}
    assert rows == {tuple(row) for row in hadamard(16)}


def test_one_large_entry_is_spread_at_any_length() -> None:
    """40 seeds, 1537 entries: beyond t = 6.3 with probability 40·1537·2·e^−19.8 = 3e-4 … 1e-6."""
    length, t = 1537, math.sqrt(2 * math.log(2 * 40 * 1537 / 1e-6))
    for place in (0, 700, 1536):
        one = np.zeros(length)
        one[place] = 1
        for seed in range(40):
            spread = rotate(one, bytes([seed]) * 32)
            assert np.abs(spread).max() <= t / math.sqrt(block(length))


@pytest.mark.parametrize("rotation", [None, SEED])
def test_the_norm_before_the_noise_is_certain(rotation: bytes | None) -> None:
    """On a coarse grid half of the first roundings are too long; large vectors are clipped."""
    encoding = DistributedNoise(4, 600, bits=10, multiplier=0.5, rotation=rotation)
    vector = vectors(1, 600)[0]
    longest = 0
    for factor in (1e-3, 1.0, 1e200):
        for _ in range(100):
            found = encoding.rounded(vector * factor)
            longest = max(longest, int(found @ found))
    assert longest <= encoding.norm2
    assert longest > 0.9 * encoding.norm2
    scaled = vector * encoding.scale  # without the condition, the bound does not hold
    once = np.floor(scaled + np.random.default_rng(0).random((100, 600))).astype(int)
    assert (np.square(once).sum(axis=1) > (encoding.scale**2 + 600 / 4)).any()


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rotation", [None, SEED])
def test_the_sum_has_the_noise_that_is_promised(noise: Noise, rotation: bytes | None) -> None:
    """n = 4096 coordinates: their mean square within 5 of its standard errors, 11 %; α = 6e-7."""
    encoding = DistributedNoise(
        8, 4096, clip=2.0, multiplier=0.8, noise=noise, tolerated=2, rotation=rotation
    )
    sent = vectors(8, 4096)
    total, _ = rehearse(Plain(), sent, terms=terms_for(sent, encoding), drops={1: 0, 5: 0})
    error = total.values - sum(sent[n] for n in total.clients)
    assert total.clients == (0, 2, 3, 4, 6, 7)
    rounding = 6 / 4 / encoding.scale**2
    expected = (0.8 * 2.0) ** 2
    assert rounding < 1e-4 * expected
    assert abs(np.mean(error**2) / expected - 1) < 5 * math.sqrt(2 / 4096)


def test_vectors_are_clipped_by_their_norm() -> None:
    encoding = DistributedNoise(1, 64, clip=0.5, multiplier=1e-3, rotation=SEED)
    vector = vectors(1, 64)[0] * 7
    found = encoding.decode(encoding.rounded(vector), clients=1)
    assert np.allclose(found, vector / 14, atol=1.5 * 8 / encoding.scale)
    assert not encoding.rounded(np.zeros(64)).any()


@pytest.mark.parametrize("variance", [0.26, 1.0, 30.0, 4000.0])
def test_the_bound_on_the_noise_covers_its_tail(variance: float) -> None:
    """P(|noise| ≥ x) ≤ 2⁻⁴⁰/3nd for both laws, by the sum of their probabilities."""
    encoding = DistributedNoise(32, 60_000)
    x = math.ceil(encoding._noise(variance))
    k = np.arange(x, x + 3000)
    allowed = 2.0**-40 / (3 * 32 * 60_000) / 2
    assert special.ive(k, variance).sum() <= allowed
    whole = np.exp(-(np.arange(-3000, 3001) ** 2) / (2 * variance)).sum()
    assert np.exp(-(k**2) / (2 * variance)).sum() / whole <= allowed
    shorter = np.arange(x // 5, x + 3000)
    assert special.ive(shorter, variance).sum() > allowed  # not idle


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("rotation", [None, SEED])
def test_sums_fit_in_their_bits(noise: Noise, rotation: bytes | None) -> None:
    encoding = DistributedNoise(16, 500, noise=noise, bits=16, rotation=rotation)
    same = np.zeros(500)
    same[3] = 1
    encoded = [encoding.encode(same) for _ in range(16)]
    assert max(np.abs(q).max() for q in encoded) <= encoding.bound
    assert np.abs(sum(encoded)).max() <= encoding.total < 2**15
    assert encoding.total > 0.98 * 2**15  # the grid is as fine as it may be
    assert encoding.total <= 16 * encoding.bound
    fits(encoding, clients=16, modulus=2**31 - 1)


def test_a_rotation_pays_where_clients_agree() -> None:
    plain = DistributedNoise(100, 60_000, multiplier=0.1)
    rotated = DistributedNoise(100, 60_000, multiplier=0.1, rotation=SEED)
    assert rotated.scale > 10 * plain.scale


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clients": 0}, "clients"),
        ({"length": 0}, "length"),
        ({"clip": 0.0}, "clip"),
        ({"multiplier": math.inf}, "multiplier"),
        ({"tolerated": 4}, "tolerated=4: expected 0 to 3"),
        ({"bits": 40}, "bits=40: expected 8 to 28"),
        ({"rotation": b"short"}, "rotation of 5 bytes"),
        ({"bits": 8, "multiplier": 0.01}, "expected more"),
        ({"bits": 8, "clients": 1000}, "expected more"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        DistributedNoise(**{"clients": 4, "length": 9, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("vector", [np.zeros(8), np.full(9, np.nan)])
def test_a_wrong_vector_is_refused(vector: np.ndarray) -> None:
    with pytest.raises(InvalidInput, match="expected 9 numbers"):
        DistributedNoise(4, 9).encode(vector)


@pytest.fixture
def with_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"plain": Plain, "distributed-dp": DistributedDP}
    monkeypatch.setattr(gradleak.crypto, "aggregations", lambda: known)


@pytest.mark.usefixtures("with_plain")
@pytest.mark.parametrize("noise", NOISES)
def test_another_protocol_sums_with_noise(noise: Noise) -> None:
    """n = 2000 coordinates, 5 standard errors; α = 6e-7."""
    spec = f"distributed-dp:inner=plain,noise={noise},multiplier=2,clip=0.5,dropouts=0.2"
    sent = vectors(9, 2000)
    total, cost = rehearse(build(spec), sent, drops={0: 0, 4: 0})
    assert not cost.rejected
    assert total.values.shape == (2000,)
    error = total.values - sum(sent[n] for n in total.clients) / 2
    assert abs(np.mean(error**2) / 1.0 - 1) < 5 * math.sqrt(2 / 2000)


@pytest.mark.usefixtures("with_plain")
def test_each_round_has_its_rotation_and_both_sides_the_same() -> None:
    protocol = DistributedDP(inner="plain")
    first, second = (Terms(bytes([b]) * 16, (0, 1, 2), 10) for b in (1, 2))
    seeds = {protocol.noisy(t).encoding.rotation for t in (first, first, second)}  # type: ignore[attr-defined]
    assert len(seeds) == 2
    assert protocol.server(first).terms == protocol.party(first, 1).terms
    assert DistributedDP(inner="plain", rotate=False).noisy(first).encoding.rotation is None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("with_plain")
def test_what_cannot_be_wrapped_is_refused() -> None:
    terms = Terms(bytes(16), (0, 1, 2), 10)
    with pytest.raises(InvalidInput, match="without noise"):
        DistributedDP(inner="distributed-dp").check(terms)
    with pytest.raises(InvalidInput, match="unknown aggregation 'plane'"):
        DistributedDP(inner="plane").check(terms)
    with pytest.raises(InvalidInput, match="tolerated=3"):
        DistributedDP(inner="plain", dropouts=0.9).check(terms)
    DistributedDP(inner="plain").check(terms)


def test_an_inner_protocol_has_fields_of_its_own() -> None:
    made = build("distributed-dp:inner=secagg-plus:threshold=3;neighbours=4,bits=20")
    assert made == DistributedDP(inner="secagg-plus:threshold=3;neighbours=4", bits=20)
    terms = Terms(bytes(16), tuple(range(6)), 10)
    assert len(made.server(terms).steps) == len(build("secagg-plus").server(terms).steps)
    with pytest.raises(InvalidInput, match="no field 'threshhold'"):
        DistributedDP(inner="secagg-plus:threshhold=3").check(terms)


def test_every_protocol_carries_the_noise() -> None:
    """All that the package has, unchanged: n = 800 coordinates, 5 standard errors; α = 6e-7."""
    sent = vectors(5, 800)
    inner = [name for name in gradleak.crypto.aggregations() if name != DistributedDP.id]
    assert len(inner) > 1
    for name in inner:
        protocol = DistributedDP(inner=name, multiplier=0.5, bits=20)
        total, _ = rehearse(protocol, sent)
        error = total.values - sum(sent[n] for n in total.clients)
        assert abs(np.mean(error**2) / 0.25 - 1) < 5 * math.sqrt(2 / 800), name
