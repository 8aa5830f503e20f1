"""Runs: settings, jobs, worker processes and the store they fill."""

from gradleak.run.settings import AuditSettings

__all__ = ["AuditSettings"]
