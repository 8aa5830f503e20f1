"""Attacks by optimisation: one paper a file, composed from the shared parts."""
