"""Attacks that solve for the input, exactly inside their theory's range. One paper a file."""
