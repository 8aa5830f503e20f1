"""DP-SGD: a step equals that of Opacus, its noise has its scale, and attackers have its density."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import nn

import gradleak as gl
from gradleak.defenses import DPSGD, Clip, GaussianNoise, Sent, build
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedAvg
from gradleak.metrics import clopper_pearson, dp_ceiling, epsilon, gaussian_ceiling
from gradleak.seeding import normal
from gradleak.types import Batch, ModelState, Update
from tests.laws.small import TwoTwins, batch_of, state_of, stream

SIZE, NORM, MULTIPLIER = 4, 0.3, 1.7


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 5), nn.ReLU(), nn.Linear(5, 3)
    )
    return net.double()


def batch() -> Batch:
    inputs = torch.rand((SIZE, 1, 4, 4), generator=stream(1), dtype=torch.float64)
    return Batch(inputs, torch.tensor([0, 1, 2, 1]))


def flat(update: Update) -> torch.Tensor:
    return torch.cat([v.flatten() for v in update.values.values()])


def opacus_step(draw: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of single examples (b, p) and the noisy gradient (p,), by Opacus's own hooks."""
    optimizer = pytest.importorskip("opacus.optimizers.optimizer")
    wrapped = pytest.importorskip("opacus").GradSampleModule(network())
    private = optimizer.DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=MULTIPLIER,
        max_grad_norm=NORM,
        expected_batch_size=SIZE,
    )
    one = batch()
    nn.functional.cross_entropy(wrapped(one.inputs), one.labels).backward()
    each = torch.cat([p.grad_sample.flatten(1) for p in private.params], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "_generate_noise", draw)
        assert private.pre_step()
    return each, torch.cat([p.grad.flatten() for p in private.params])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_one_step_equals_that_of_opacus() -> None:
    """Float64. Opacus clips by C / (‖g‖ + 1e-6), which alone separates the two."""
    generator = stream(5)

    def draw(std: float, reference: torch.Tensor, **_: object) -> torch.Tensor:
        return std * normal(reference.shape, generator=generator, dtype=reference.dtype)

    each, theirs = opacus_step(draw)
    one, state = batch(), ModelState.of(network())
    singles = [
        flat(gl.FedSGD().mean(state, Batch(x[None], y[None])))
        for x, y in zip(one.inputs, one.labels)
    ]
    torch.testing.assert_close(each, torch.stack(singles), rtol=1e-10, atol=1e-13)
    lengths = each.norm(dim=1)
    assert bool((lengths > NORM).any()), "clipping bites"

    client = DPSGD(NORM, MULTIPLIER, "example")(gl.FedSGD())
    ours = flat(client.sample(state, one, generator=stream(5)))
    gap = sum((NORM / n - NORM / (n + 1e-6)) * n for n in lengths.clamp(min=NORM).tolist()) / SIZE
    assert float((ours - theirs).norm()) <= gap + 1e-12
    assert float((ours - flat(client.mean(state, one))).norm()) > 100 * gap, "noise was added"


@pytest.mark.parametrize(("scope", "std"), [("user", 0.6), ("example", 0.2)])
def test_the_noise_has_the_scale_it_claims(scope: str, std: float) -> None:
    """H0: z-scores are standard normal; n = 200 updates of 27 coordinates or more, alpha = 1e-6.

    Planted fault: a tenth less noise.
    """
    client = build(f"dp-sgd:norm=0.3,noise_multiplier=2,scope={scope}")(gl.FedSGD())
    state, three = state_of(TwoTwins), batch_of(3)
    generator = stream(2)
    mean = flat(client.mean(state, three))
    z = (
        torch.stack(
            [flat(client.sample(state, three, generator=generator)) - mean for _ in range(200)]
        ).flatten()
        / std
    )
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(z))
    assert low < float(z.square().sum()) < high
    assert float((0.9 * z).square().sum()) < low
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6


def test_no_example_and_no_client_moves_the_mean_by_more_than_its_bound() -> None:
    """Sensitivity of the sum, measured by leaving every example out."""
    state, four = state_of(TwoTwins), batch_of(4)
    by_example = DPSGD(norm=0.05, scope="example")(gl.FedSGD())
    whole = 4 * flat(by_example.mean(state, four))
    for i in range(4):
        rest = [j for j in range(4) if j != i]
        without = 3 * flat(by_example.mean(state, Batch(four.inputs[rest], four.labels[rest])))
        assert float((whole - without).norm()) <= 0.05 * (1 + 1e-9)
    local = DPSGD(norm=0.05)(FedAvg(steps=3, learning_rate=0.5))
    assert float(flat(local.mean(state, four)).norm()) <= 0.05 * (1 + 1e-9)


def test_the_density_is_that_of_clipping_followed_by_noise() -> None:
    state, three = state_of(TwoTwins), batch_of(3)
    for scope, of_clip, std in (("example", "example", 0.2), ("user", "update", 0.6)):
        client = DPSGD(0.3, 2.0, scope)(gl.FedSGD())  # type: ignore[arg-type]
        composed = GaussianNoise(std)(Clip(0.3, of_clip)(gl.FedSGD()))  # type: ignore[arg-type]
        update = client.sample(state, three, generator=stream(3))
        same = composed.sample(state, three, generator=stream(3))
        torch.testing.assert_close(flat(update), flat(same), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            client.log_prob(update, state, three), composed.log_prob(update, state, three)
        )


@pytest.mark.parametrize(("scope", "share"), [("user", 0.5), ("example", 0.68)])
def test_missing_noise_is_doubted(scope: str, share: float) -> None:
    """By example half the noise looks like that of twice the batch; what lies between does not."""
    rule = DPSGD(0.3, 2.0, scope)  # type: ignore[arg-type]
    state, four = ModelState.of(network()), batch()
    one = Batch(four.inputs[:1], four.labels[:1])
    before, after = (f(state, one) for f in (rule(gl.FedSGD()).mean, played(rule)))
    assert rule.doubt(before, after) is None
    weak = {k: v + share * (after.values[k] - v) for k, v in before.values.items()}
    assert rule.doubt(before, Update(weak, after.kind)) is not None


def played(rule: DPSGD) -> Callable[[ModelState, Batch], Update]:
    return lambda state, batch: rule(gl.FedSGD()).sample(state, batch, generator=stream(4))


def test_by_example_needs_examples() -> None:
    for core in (FedAvg(), Clip()(gl.FedSGD())):
        with pytest.raises(InvalidInput, match="dp-sgd:scope=example: expected it first"):
            DPSGD(scope="example")(core)
    with pytest.raises(InvalidInput, match=r"sample_rate=1\.5: expected a share"):
        DPSGD(sample_rate=1.5)
    with pytest.raises(InvalidInput, match="rounds=0: expected at least 1"):
        DPSGD(rounds=0)
    with pytest.raises(InvalidInput, match="noise_multiplier"):
        DPSGD(noise_multiplier=math.inf)


CANARIES = 100


def canary_hits(multiplier: float, *, claimed: float, trials: int) -> int:
    """How often the likeliest canary is the true one: the strongest attack there is.

    Canaries are orthogonal updates that clipping shortens.
    """
    clients = [
        DPSGD(0.7, claimed)(Sent(Update({"weight": row}, "gradient")))
        for row in torch.eye(CANARIES)
    ]
    state, nobody, generator = state_of(TwoTwins), batch_of(1), stream(CANARIES)
    hits = 0
    for trial in range(trials):
        client = clients[trial % CANARIES]
        clean = client.mean(state, nobody).values["weight"]
        sent = client.sample(state, nobody, generator=generator).values["weight"]
        hits += int((clean + multiplier / claimed * (sent - clean)).argmax()) == trial % CANARIES
    return hits


def multiplier_of(target: float) -> float:
    """The noise multiplier of which one update has this ε."""
    found = brentq(lambda m: epsilon(1e-5, noise_multiplier=m) - target, 0.02, 50)
    return float(found)


@pytest.mark.parametrize(
    ("target", "trials", "detectable"),
    [(1.0, 4000, True), (3.0, 600, True), (10.0, 600, True), (100.0, 600, False)],
)
def test_canaries_stay_below_the_ceiling_of_the_accounted_epsilon(
    target: float, trials: int, detectable: bool
) -> None:
    """H0: success ≤ ceiling, one-sided alpha = 0.001. Planted fault: half the claimed noise.

    At ε = 100 the ceiling is 1: no fault can be seen there, because nothing is promised.
    """
    m = multiplier_of(target)
    ceiling = dp_ceiling(0.01, lambda delta: epsilon(delta, noise_multiplier=m))
    tight = gaussian_ceiling(0.01, noise_multiplier=m)
    assert tight <= ceiling

    def exceeds(hits: int) -> bool:
        return clopper_pearson(hits, trials, confidence=0.998).low > tight

    honest = canary_hits(m, claimed=m, trials=trials)
    assert not exceeds(honest)
    assert honest / trials > 0.6 * tight, "the attack is no straw man"
    assert exceeds(canary_hits(m / 2, claimed=m, trials=trials)) == detectable
