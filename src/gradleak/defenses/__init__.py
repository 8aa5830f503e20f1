"""Protections as wrappers of mechanisms; they compose as an onion.

GaussianNoise(std=0.01)(Clip(norm=1.0)(FedSGD()))
"""

from collections.abc import Callable
from typing import Any

from gradleak.defenses.ats import ATS
from gradleak.defenses.censor import Censor
from gradleak.defenses.clip import Clip
from gradleak.defenses.cvb import ConvolutionalBottleneck
from gradleak.defenses.dgc import DGC
from gradleak.defenses.dp_sgd import DPSGD
from gradleak.defenses.encoded import mixes_labels
from gradleak.defenses.gradient_slices import GradientSlices
from gradleak.defenses.instahide import InstaHide
from gradleak.defenses.label_smoothing import LabelSmoothing
from gradleak.defenses.mixup import MixUp
from gradleak.defenses.noise import GaussianNoise, LaplaceNoise
from gradleak.defenses.none import NoDefense
from gradleak.defenses.outpost import Outpost
from gradleak.defenses.partial_sharing import PartialSharing
from gradleak.defenses.precode import Precode
from gradleak.defenses.quantize import Quantize
from gradleak.defenses.random_mask import RandomMask
from gradleak.defenses.risk_noise import RiskNoise
from gradleak.defenses.rounding import Round
from gradleak.defenses.sheet import Sheet
from gradleak.defenses.sign import Sign
from gradleak.defenses.soteria import Soteria
from gradleak.defenses.sparsify import TopK
from gradleak.defenses.wrapped import (
    Defense,
    Memory,
    Sent,
    Wrapped,
    advanced,
    asks_for_public,
    compensated,
    difference,
    gathered,
    informed,
    norm,
    rebased,
    undefended,
)
from gradleak.registry import build as _build
from gradleak.types import Mechanism

DEFENSES: dict[str, type[Any]] = {
    d.id: d
    for d in (
        NoDefense,
        GaussianNoise,
        LaplaceNoise,
        TopK,
        RandomMask,
        PartialSharing,
        Quantize,
        Round,
        Sign,
        Clip,
        DPSGD,
        Soteria,
        ATS,
        Precode,
        GradientSlices,
        RiskNoise,
        DGC,
        Outpost,
        Censor,
        ConvolutionalBottleneck,
        MixUp,
        InstaHide,
        LabelSmoothing,
    )
}


def build(spec: str) -> Callable[[Mechanism], Mechanism]:
    """Build "id:field=value,..."; several joined by "+" apply from left to right.

    Example: "clip:norm=1+gaussian-noise:std=0.1" clips first and then adds noise.
    """
    layers = [_build("defense", part.strip(), DEFENSES) for part in spec.split("+")]

    def wrap(mechanism: Mechanism) -> Mechanism:
        for layer in layers:
            mechanism = layer(mechanism)
        return mechanism

    return wrap


__all__ = [
    "ATS",
    "DEFENSES",
    "DGC",
    "DPSGD",
    "Censor",
    "Clip",
    "ConvolutionalBottleneck",
    "Defense",
    "GaussianNoise",
    "GradientSlices",
    "InstaHide",
    "LabelSmoothing",
    "LaplaceNoise",
    "Memory",
    "MixUp",
    "NoDefense",
    "Outpost",
    "PartialSharing",
    "Precode",
    "Quantize",
    "RandomMask",
    "RiskNoise",
    "Round",
    "Sent",
    "Sheet",
    "Sign",
    "Soteria",
    "TopK",
    "Wrapped",
    "advanced",
    "asks_for_public",
    "build",
    "compensated",
    "difference",
    "gathered",
    "informed",
    "mixes_labels",
    "norm",
    "rebased",
    "undefended",
]
