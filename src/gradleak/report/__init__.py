"""From stored trials to findings, and from findings to a page for people."""
