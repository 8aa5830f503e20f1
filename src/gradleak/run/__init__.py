"""Runs: settings, jobs, worker processes and the store they fill."""

from gradleak.run.auditing import LeakageReport, audit
from gradleak.run.settings import AuditSettings

__all__ = ["AuditSettings", "LeakageReport", "audit"]
