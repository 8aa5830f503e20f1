"""gradleak measures what a federated-learning server can reconstruct from client updates."""
