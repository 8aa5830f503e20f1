"""A whole round in one process, with real bytes, dropouts and a price list."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gradleak.crypto.encoding import Encoding, FixedPoint, Reals
from gradleak.crypto.keys import fresh
from gradleak.crypto.protocol import HELPER, SESSION, Aggregation, Party, Server, Terms, Total
from gradleak.crypto.rejection import Rejected

Tamper = Callable[[int, int, bytes], bytes]
"""Step, receiver or sender, and a message: the message that arrives instead."""


@dataclass
class Cost:
    """What a round took.

    Attributes:
        client_seconds: CPU, by client, over all steps.
        helper_seconds: CPU, by helping server.
        server_seconds: CPU of the server, by step, closing included.
        bytes_up: sent by each party.
        bytes_down: sent to each party.
        rejected: parties whose message was refused, with the reason's name.
    """

    client_seconds: dict[int, float] = field(default_factory=dict)
    helper_seconds: dict[int, float] = field(default_factory=dict)
    server_seconds: list[float] = field(default_factory=list)
    bytes_up: dict[int, int] = field(default_factory=dict)
    bytes_down: dict[int, int] = field(default_factory=dict)
    rejected: dict[int, str] = field(default_factory=dict)


def terms_for(vectors: Mapping[int, Reals], encoding: Encoding | None = None) -> Terms:
    """Terms of a fresh session over some clients' vectors."""
    length = len(next(iter(vectors.values())))
    return Terms(fresh(SESSION), tuple(sorted(vectors)), length, encoding or FixedPoint())


def rehearse(
    aggregation: Aggregation,
    vectors: Mapping[int, Reals],
    *,
    terms: Terms | None = None,
    drops: Mapping[int, int] | None = None,
    down: Tamper | None = None,
    up: Tamper | None = None,
    signing: Mapping[int, bytes] | None = None,
) -> tuple[Total, Cost]:
    """Play one round.

    Args:
        aggregation: the protocol.
        vectors: by client, all of one length.
        terms: agreed; None for fresh ones with the usual encoding.
        drops: by party, the step that it no longer answers.
        down: changes requests on their way.
        up: changes answers on their way.
        signing: secrets by client, where the protocol signs.

    Raises:
        Aborted: too few are left.
    """
    terms = terms or terms_for(vectors)
    aggregation.check(terms)
    server: Server = aggregation.server(terms)
    parties: dict[int, Party] = {
        n: aggregation.party(terms, n, lambda n=n: vectors[n])  # type: ignore[misc]
        for n in terms.clients
    }
    for k in range(aggregation.helpers):
        parties[HELPER + k] = aggregation.party(terms, HELPER + k)
    for number, secret in (signing or {}).items():
        parties[number].signing = secret
    cost, away = Cost(), dict(drops or {})
    while True:
        began = time.process_time()
        requests = server.requests()
        spent = time.process_time() - began
        if not requests:
            return server.total, cost
        for number, request in requests.items():
            if away.get(number, len(server.steps)) <= server.step:
                continue
            if down:
                request = down(server.step, number, request)
            seconds = cost.helper_seconds if number >= HELPER else cost.client_seconds
            cost.bytes_down[number] = cost.bytes_down.get(number, 0) + len(request)
            began = time.process_time()
            try:
                reply = parties[number].answer(request)
            except Rejected as refusal:
                cost.rejected[number] = refusal.reason
                away[number] = server.step
                continue
            finally:
                taken = time.process_time() - began
                seconds[number] = seconds.get(number, 0.0) + taken
            cost.bytes_up[number] = cost.bytes_up.get(number, 0) + len(reply)
            if up:
                reply = up(server.step, number, reply)
            began = time.process_time()
            try:
                server.receive(number, reply)
            except Rejected as refusal:
                cost.rejected[number] = refusal.reason
                away[number] = server.step
            spent += time.process_time() - began
        began = time.process_time()
        server.close()
        cost.server_seconds.append(spent + time.process_time() - began)
