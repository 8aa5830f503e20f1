"""Local training as mechanisms p(update | state, batch)."""

from gradleak.mechanisms.fedavg import FedAvg
from gradleak.mechanisms.fedsgd import FedSGD

MECHANISMS: dict[str, type[FedSGD] | type[FedAvg]] = {m.id: m for m in (FedSGD, FedAvg)}

__all__ = ["MECHANISMS", "FedAvg", "FedSGD"]
