"""The command line: parse, call, print."""

from gradleak.cli.app import main, run

__all__ = ["main", "run"]
