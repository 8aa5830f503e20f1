"""Local training as mechanisms p(update | state, batch)."""

from gradleak.mechanisms.aggregate import Aggregate, summed
from gradleak.mechanisms.denoising import Denoising, DenoisingAvg, Diffusing, Draws
from gradleak.mechanisms.fedavg import FedAvg
from gradleak.mechanisms.fedsgd import FedSGD
from gradleak.mechanisms.vertical import Vertical

MECHANISMS: dict[str, type[FedSGD] | type[FedAvg] | type[Vertical]] = {
    m.id: m for m in (FedSGD, FedAvg, Vertical, Denoising, DenoisingAvg)
}

__all__ = [
    "MECHANISMS",
    "Aggregate",
    "Denoising",
    "DenoisingAvg",
    "Diffusing",
    "Draws",
    "FedAvg",
    "FedSGD",
    "Vertical",
    "summed",
]
