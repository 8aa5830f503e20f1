"""Federated training on Flower: the same apps in this process, on Ray or deployed."""

from gradleak.federate.client_mod import client_update, protect
from gradleak.federate.recording import record
from gradleak.federate.secure_sum import secure_sum

__all__ = ["client_update", "protect", "record", "secure_sum"]
