"""Federated training on Flower: the same apps in this process, on Ray or deployed."""

from gradleak.federate.client_mod import client_update, protect
from gradleak.federate.recording import record

__all__ = ["client_update", "protect", "record"]
