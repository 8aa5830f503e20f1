"""Federated training on Flower: the same apps in this process, on Ray or deployed."""
