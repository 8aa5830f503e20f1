"""Single updates from sums over changing participants, in closed form.

A server that aggregates securely still knows who took part in which round. With w_ti the weight of
client i in the sum of round t, and clients that send the same u_i whenever they take part,

    s_t = Σ_i w_ti u_i,    U = W⁺ S,    u_i is exact  ⇔  e_i lies in the row space of W
                                                      ⇔  (W⁺ W)_ii = 1

Two sums that differ in one client are the smallest case. Where u_i moves from round to round, by
the server's steps or by fresh examples, U is the least-squares fit, and noise of standard deviation
s on every sum becomes s ‖row i of W⁺‖ on u_i. Lam, Wei, Brooks, Reddi & Mitzenmacher, "Gradient
Disaggregation: Breaking Privacy in Federated Learning by Reconstructing the User Participant
Matrix", ICML 2021, find W as well, from how often each device took part; here the server knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import InvalidInput
from gradleak.types import Update

_EXACT = 1e-9
"""How far (W⁺W)_ii may fall short of 1 by rounding."""


@dataclass(frozen=True)
class Individuals:
    """What sums tell of every client.

    Attributes:
        updates: least squares of smallest norm, one per client.
        exact: (clients,) bool, whether the participation alone determines it.
        amplification: (clients,) by how much independent noise on the sums grows in it.
    """

    updates: tuple[Update, ...]
    exact: Tensor
    amplification: Tensor


def solvable(weights: Tensor) -> Tensor:
    """Whose update the sums determine, (clients,) bool, for weights (rounds, clients)."""
    return _inverse(weights)[1]


def difference(sums: Sequence[Update], weights: Tensor) -> Individuals:
    """Solve sums for the clients' updates.

    Args:
        sums: one per round, all of one kind.
        weights: (rounds, clients) of every client in every sum, 0 where it took no part; a mean
            over k participants weighs each 1/k.

    Raises:
        InvalidInput: not one sum per row.
    """
    if weights.ndim != 2 or len(sums) != len(weights):
        raise InvalidInput(f"{len(sums)} sums for weights {tuple(weights.shape)}: expected equal")
    inverse, exact = _inverse(weights)
    solved = {
        name: torch.tensordot(
            inverse, torch.stack([s.values[name].detach().double().cpu() for s in sums]), 1
        )
        for name in sums[0].values
    }
    updates = tuple(
        Update({k: v[i] for k, v in solved.items()}, sums[0].kind) for i in range(weights.shape[1])
    )
    return Individuals(updates, exact, inverse.norm(dim=1))


def _inverse(weights: Tensor) -> tuple[Tensor, Tensor]:
    known = weights.double().cpu()
    inverse = torch.linalg.pinv(known)
    return inverse, (inverse @ known).diagonal() > 1 - _EXACT
