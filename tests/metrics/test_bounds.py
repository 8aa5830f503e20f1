"""Against closed forms and quadrature, then against a strong estimator on 1000 targets."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from gradleak.data import load
from gradleak.errors import InvalidInput
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.metrics import (
    Floor,
    dfil,
    dfil_probed,
    gaussian_information,
    influence,
    influence_bound,
    information_matrix,
    jacobian,
    laplace_information,
    posterior_trace,
    recoverable_dimensions,
    update_map,
    van_trees_floor,
)
from gradleak.types import ModelState

ALPHA = 1e-6


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def smooth_map(d: int, p: int) -> Callable[[Tensor], Tensor]:
    first, second = random(2 * d, d, seed=1) / d**0.5, random(p, 2 * d, seed=2) / d**0.5
    return lambda x: second @ torch.tanh(first @ x.flatten())


@pytest.mark.parametrize("mechanism", [FedSGD(), FedAvg(learning_rate=0.5, steps=10)])
def test_products_agree_with_plain_autograd(mechanism: FedSGD | FedAvg) -> None:
    """Convolution, ReLU, pooling; ten local steps recompute their graphs (no forward mode)."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 3)
    )
    f = update_map(mechanism, ModelState.of(net), torch.tensor([0, 2]))
    x = random(2, 1, 4, 4)
    reference = torch.autograd.functional.jacobian(f, x).flatten(1)
    weights = random(len(reference), seed=3).square()
    for chunk in (5, 64):
        torch.testing.assert_close(jacobian(f, x, chunk=chunk), reference)
        matrix = information_matrix(f, x, per_coordinate=weights, chunk=chunk)
        torch.testing.assert_close(matrix, reference.T @ (weights[:, None] * reference))


def test_linear_gaussian_floor_is_the_smallest_error() -> None:
    """f(x) = A x: the posterior covariance is (AᵀA/σ² + Σ⁻¹)⁻¹ at every x, so all three agree."""
    a, root, std = random(4, 6), random(6, 6, seed=1), 0.3
    precision = torch.linalg.inv(root @ root.T)
    smallest = float(torch.linalg.inv(a.T @ a / std**2 + precision).trace()) / 6

    def information(x: Tensor) -> Tensor:
        return information_matrix(lambda v: a @ v, x, per_coordinate=gaussian_information(std))

    floor = van_trees_floor(information, random(8, 6, seed=2), precision=precision)
    assert floor.proved == pytest.approx(smallest, rel=1e-9)
    assert floor.estimate == pytest.approx(smallest, rel=1e-9)
    score = posterior_trace(information(random(6)), precision)
    assert score == pytest.approx(smallest, rel=1e-9)


MAPS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "linear": (lambda x: x, np.ones_like),
    "cubic": (lambda x: x**3, lambda x: 3 * x**2),
    "tanh": (lambda x: np.tanh(2 * x), lambda x: 2 / np.cosh(2 * x) ** 2),
}
X = np.linspace(-7, 7, 701)
PRIOR = np.exp(-(X**2) / 2) / np.exp(-(X**2) / 2).sum()


def smallest_error(f: Callable[..., np.ndarray], log_density: Callable[..., np.ndarray]) -> float:
    """E x² − E (E[x | y])² for x ~ N(0, 1) and y = f(x) + noise, by quadrature."""
    mean = f(X)
    y = np.linspace(mean.min() - 12, mean.max() + 12, 4001)
    joint = np.exp(log_density(y[:, None] - mean)) * PRIOR
    evidence = joint.sum(1)
    posterior_mean = np.divide(joint @ X, evidence, where=evidence > 0, out=np.zeros_like(y))
    return float(1 - (evidence * posterior_mean**2).sum() * (y[1] - y[0]))


@functools.cache
def one_entry(name: str, noise: str, std: float) -> tuple[float, float, float]:
    """(exact floor, smallest error, mean of the posterior trace) for one entry."""
    f, slope = MAPS[name]
    if noise == "gaussian":
        unit, error = gaussian_information(std), smallest_error(f, stats.norm(0, std).logpdf)
    else:
        unit, error = (
            laplace_information(std),
            smallest_error(f, stats.laplace(0, std / 2**0.5).logpdf),
        )
    squared = slope(X) ** 2 * unit
    return 1 / (1 + PRIOR @ squared), error, float(PRIOR @ (1 / (1 + squared)))


@pytest.mark.parametrize("std", [0.2, 1.0])
@pytest.mark.parametrize("noise", ["gaussian", "laplace"])
@pytest.mark.parametrize("name", MAPS)
def test_floor_is_below_the_smallest_error_of_one_entry(name: str, noise: str, std: float) -> None:
    floor, error, _ = one_entry(name, noise, std)
    assert floor <= error + 1e-6
    assert (name, noise) != ("linear", "gaussian") or floor == pytest.approx(error, rel=1e-4)


def test_an_average_of_traces_is_no_bound() -> None:
    """Flat at 0 and steep elsewhere, x³ is estimated better than its local scores say."""
    _, error, traces = one_entry("cubic", "gaussian", 0.2)
    assert traces > 2 * error


def draws_that_stay_below(name: str, draws: int, repeats: int = 400) -> int:
    """How often the proved floor lies below the exact one."""
    exact, _, _ = one_entry(name, "gaussian", 1.0)
    rng = np.random.default_rng(0)
    one = torch.ones(1, 1, dtype=torch.float64)
    count = 0
    for _ in range(repeats):
        x = rng.standard_normal(draws)
        information = torch.from_numpy(MAPS[name][1](x) ** 2).reshape(-1, 1, 1)
        count += van_trees_floor(lambda v: v, information, precision=one).proved <= exact
    return count


def test_confidence_of_the_floor() -> None:
    """95 % nominal, 400 floors of 40 draws, alpha = 1e-3: bounded information, and a far tail (x⁴
    under a normal prior)."""
    for name in ("tanh", "cubic"):
        assert draws_that_stay_below(name, 40) >= stats.binom.ppf(1e-3, 400, 0.95)


class Digits:
    """Normal prior fitted to digits, and a tanh network's gradient under Gaussian noise."""

    def __init__(self) -> None:
        data = load("digits")
        x = data.batch(range(len(data))).inputs.double().flatten(1)
        covariance = 0.9 * torch.cov(x.T) + 0.1 * x.var(0).mean() * torch.eye(64)
        self.mean, self.root = x.mean(0), torch.linalg.cholesky(covariance)
        self.precision = torch.cholesky_inverse(self.root)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 10))
        self.f = update_map(FedSGD(), ModelState.of(net), torch.tensor([3]))
        self.one = lambda x: self.f(x.reshape(1, 1, 8, 8))

    def draw(self, n: int, seed: int) -> Tensor:
        return self.mean + random(n, 64, seed=seed) @ self.root.T

    def floor(self, std: float) -> Floor:
        def information(x: Tensor) -> Tensor:
            return information_matrix(self.one, x, per_coordinate=gaussian_information(std))

        return van_trees_floor(information, self.draw(40, 1), precision=self.precision)

    def errors(self, std: float, n: int = 1000) -> Tensor:
        """Squared error per entry of the MAP estimate, by Gauss–Newton from the prior's mean."""
        update, slope = torch.func.vmap(self.one), torch.func.vmap(torch.func.jacfwd(self.one))
        truth = self.draw(n, 2)
        sent = update(truth)
        sent = sent + std * random(*sent.shape, seed=3)
        found = []
        for received in sent.split(125):
            x = self.mean.expand(len(received), 64)
            for _ in range(4):
                j = slope(x)
                pull = (j.mT @ (received - update(x))[..., None])[..., 0] / std**2
                hessian = j.mT @ j / std**2 + self.precision
                x = x + torch.linalg.solve(hessian, pull - (x - self.mean) @ self.precision)
            found.append(x)
        return (torch.cat(found) - truth).square().mean(1)


def below(errors: Tensor, floor: float) -> bool:
    """Whether the mean error is significantly (one-sided t, alpha = 1e-6) below the floor."""
    return bool(stats.ttest_1samp(errors.numpy(), floor, alternative="less").pvalue < ALPHA)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # jacfwd
def test_no_estimate_of_1000_digits_goes_below_the_floor() -> None:
    """H0: the mean error is at least the floor. Planted fault: half the noise that is claimed."""
    digits = Digits()
    floor, errors = digits.floor(0.1), digits.errors(0.1)
    assert not below(errors, floor.proved)
    assert errors.mean() < 1.25 * floor.proved, "nearly reached: the check has power"
    assert floor.proved > 0.05 * digits.root.square().sum() / 64, "and is no trivial floor"
    assert below(digits.errors(0.05, n=250), floor.proved), "planted fault"


def test_dfil_by_probes() -> None:
    """500 probes within 5 standard errors of the trace (alpha = 1e-6), for p weights."""
    f, x, weights = smooth_map(7, 30), random(7), random(30, seed=4).square()
    exact = dfil(information_matrix(f, x, per_coordinate=weights))
    value, error = dfil_probed(
        f, x, per_coordinate=weights, probes=500, generator=torch.Generator().manual_seed(0)
    )
    assert abs(value - exact) < 5 * error
    assert error < 0.1 * exact


def test_the_unbiased_floor_does_not_bind_a_prior() -> None:
    """f(x) = a x: least squares reaches 1/η², the posterior mean goes below it."""
    a, std = 0.5, 1.0
    information = torch.full((1, 1), a**2, dtype=torch.float64) * gaussian_information(std)
    assert 1 / dfil(information) == pytest.approx((std / a) ** 2)
    assert posterior_trace(information, torch.eye(1, dtype=torch.float64)) < 1 / dfil(information)


@pytest.mark.parametrize("d", [1, 7, 80])
def test_influence_and_its_bound(d: int) -> None:
    """Exact against the inverse; the bound below it for every δ, and reached along the top
    singular direction. 80 entries go through Lanczos."""
    f, x, p = smooth_map(d, 3 * d), random(d), 3 * d
    generator = torch.Generator().manual_seed(0)
    j = jacobian(f, x)
    for damping in (1e-6, 1e-2, 1.0):
        inverse = torch.linalg.inv(j.T @ j + damping * torch.eye(d))
        for delta in (random(p, seed=5), random(p, seed=6) ** 3):
            exact = influence(f, x, delta, damping=damping)
            assert exact == pytest.approx(float((inverse @ j.T @ delta).norm()), rel=1e-6)
            bound = influence_bound(f, x, delta, damping=damping, generator=generator)
            assert 0 < bound <= exact * (1 + 1e-9)
        top = torch.linalg.svd(j).U[:, 0]
        assert influence_bound(f, x, top, damping=damping, generator=generator) == pytest.approx(
            influence(f, x, top, damping=damping), rel=1e-5
        )


def test_rank_of_known_maps() -> None:
    left, right, x = random(20, 9), random(9, 9, seed=1), random(9)
    left, right = torch.linalg.qr(left).Q, torch.linalg.qr(right).Q

    def rank(*values: float, **options: float | Tensor) -> int:
        scale = torch.tensor([*values, *[0.0] * (9 - len(values))], dtype=torch.float64)
        return recoverable_dimensions(lambda v: left @ (scale * (right @ v)), x, **options)  # type: ignore[arg-type]

    assert rank() == 0
    assert rank(1, 1, 2) == 3
    assert rank(*[1.0] * 9) == 9
    assert rank(1, 1, 1e-5) == 3
    assert rank(1, 1, 1e-7) == 2, "below the stated tolerance"
    assert rank(1, 1, 1e-3, tolerance=1e-2) == 2


def test_rank_counts_exact_coordinates_only() -> None:
    a, x = random(12, 5), random(5)
    std = torch.tensor([0.0] * 3 + [1e-9] * 9)
    assert recoverable_dimensions(lambda v: a @ v, x) == 5
    assert recoverable_dimensions(lambda v: a @ v, x, noise_std=std) == 3
    assert recoverable_dimensions(lambda v: a @ v, x, noise_std=1e-9) == 0
    gram = information_matrix(lambda v: a @ v, x, per_coordinate=gaussian_information(1e-9))
    tiny = posterior_trace(gram, torch.eye(5, dtype=torch.float64))
    assert tiny < 1e-15, "nothing is exact, and yet everything is known"


def test_one_example_through_a_biased_first_layer_is_determined() -> None:
    digits = Digits()
    assert recoverable_dimensions(digits.one, digits.draw(1, 5)) == 64


def test_invalid_inputs_are_refused_in_one_line() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    f, x = smooth_map(2, 3), random(2)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: gaussian_information(0.0), "std=0.0: expected a positive number"),
        (lambda: van_trees_floor(lambda v: v, [eye] * 3, precision=eye), "3 draws"),
        (lambda: van_trees_floor(lambda v: v, [eye] * 4, precision=eye, confidence=95), "95"),
        (lambda: posterior_trace(torch.eye(3), eye), r"information \(3, 3\) and precision"),
        (lambda: posterior_trace(0 * eye, 0 * eye), "singular: expected a proper prior"),
        (lambda: information_matrix(lambda v: v[None], x), r"shape \(1, 2\): expected one vector"),
        (lambda: influence(f, x, random(4), damping=1.0), r"perturbation \(4,\): expected \(3,\)"),
        (lambda: influence(f, x, random(3), damping=0.0), "damping=0.0"),
        (lambda: recoverable_dimensions(f, x, tolerance=1e-9), "tolerance=1e-09"),
        (lambda: dfil_probed(f, x, probes=1, generator=torch.Generator()), "probes=1"),
    ]
    for call, message in calls:
        with pytest.raises(InvalidInput, match=message):
            call()
