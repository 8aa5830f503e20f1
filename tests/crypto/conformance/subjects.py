"""Every protocol at a small size, with what its parameters promise."""

from __future__ import annotations

import pytest

from gradleak.crypto.additive import AdditiveMpc
from gradleak.crypto.ckks import Ckks
from gradleak.crypto.conformance import Rehearsed
from gradleak.crypto.encoding import FixedPoint
from gradleak.crypto.fastsecagg import FastSecAgg
from gradleak.crypto.lightsecagg import LightSecAgg
from gradleak.crypto.paillier import Paillier
from gradleak.crypto.secagg import SecAgg
from gradleak.crypto.secagg_plus import SecAggPlus

SUBJECTS = {
    "secagg": Rehearsed(SecAgg(threshold=3), 5, survives=2, modulus=2**32),
    "secagg-64": Rehearsed(
        SecAgg(threshold=3), 5, survives=2, modulus=2**64, encoding=FixedPoint(fraction=40)
    ),
    "secagg-active": Rehearsed(SecAgg(active=True), 5, survives=1, modulus=2**32, signed=True),
    "secagg-plus": Rehearsed(
        SecAggPlus(neighbours=6, threshold=4, dropouts=0.25), 8, survives=2, modulus=2**32
    ),
    "lightsecagg": Rehearsed(LightSecAgg(privacy=2, dropouts=1), 5, survives=1, modulus=2**31 - 1),
    "lightsecagg-61": Rehearsed(
        LightSecAgg(privacy=1, dropouts=2),
        5,
        survives=2,
        modulus=2**61 - 1,
        encoding=FixedPoint(fraction=40),
    ),
    "fastsecagg": Rehearsed(
        FastSecAgg(privacy=2, dropouts=1), 5, survives=1, modulus=15 * 2**27 + 1
    ),
    "additive-mpc": Rehearsed(AdditiveMpc(servers=2), 4, survives=2, modulus=2**64),
    "additive-mpc-3": Rehearsed(AdditiveMpc(servers=3), 4, survives=2, modulus=2**64),
    "paillier": Rehearsed(Paillier(bits=512, unsafe_small_keys=True), 4, survives=2, modulus=0),
    "ckks": Rehearsed(Ckks(), 4, survives=2, modulus=0),
}

LONG = {"secagg-64", "secagg-plus", "lightsecagg-61", "additive-mpc-3", "ckks"}
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SUBJECTS]
"""Their names; those whose rounds take long, or that others resemble, for the slow tests only."""
