"""What gradient-inversion attacks are made of."""
