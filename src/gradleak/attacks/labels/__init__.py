"""Label recovery: what the gradient of the head says of the classes in a batch."""

from __future__ import annotations

import sys
from typing import Any

from gradleak.attacks.labels.rule import LabelRule, RuleAbout
from gradleak.registry import build as _build
from gradleak.registry import described_in

__all__ = ["LABEL_RULES", "LabelRule", "RuleAbout", "build"]


LABEL_RULES: dict[str, type[Any]] = described_in(sys.modules[__name__], RuleAbout)


def build(spec: str) -> LabelRule:
    """Build a rule from "id:field=value,..."."""
    rule: LabelRule = _build("label rule", spec, LABEL_RULES)
    return rule
