"""Why a message is not accepted, and why a round ends without a sum."""

from __future__ import annotations

from enum import StrEnum

from gradleak.errors import GradleakError


class Reason(StrEnum):
    """Names of what can be wrong with a message; tests and logs rely on them."""

    MALFORMED = "malformed"
    TRUNCATED = "truncated"
    TRAILING_BYTES = "trailing-bytes"
    OTHER_TYPE = "other-type"
    OTHER_PROTOCOL = "other-protocol"
    OTHER_SESSION = "other-session"
    OTHER_STEP = "other-step"
    OTHER_SENDER = "other-sender"
    UNKNOWN_SENDER = "unknown-sender"
    REPEATED = "repeated"
    WRONG_LENGTH = "wrong-length"
    OUT_OF_RANGE = "out-of-range"
    WRONG_PEERS = "wrong-peers"
    TOO_FEW_PEERS = "too-few-peers"
    INVALID_KEY = "invalid-key"
    REUSED_KEY = "reused-key"
    BAD_SIGNATURE = "bad-signature"
    NOT_AUTHENTIC = "not-authentic"
    BAD_SHARE = "bad-share"
    INCONSISTENT_SURVIVORS = "inconsistent-survivors"
    BAD_CIPHERTEXT = "bad-ciphertext"


class Rejected(GradleakError):
    """A message that is not accepted; the receiver's state is as it was before.

    Args:
        reason: its name.
        detail: what was there and what was expected, one clause.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Aborted(GradleakError):
    """A round that ends without a sum: too few are left to make one."""
