"""Each family against an independent reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor

from gradleak import priors
from gradleak.errors import InvalidInput
from gradleak.priors import Gaussians
from gradleak.types import Batch, DataSpec
from tests.laws.small import SPEC, stream
from tests.priors.test_laws import ALPHA, examples

PUBLIC = examples(SPEC, 120)
ROWS = PUBLIC.inputs.flatten(1).numpy()
X = examples(SPEC, 6, seed=8).inputs[:, None]
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
FLOOR = (1 / 255) ** 2 / 12


def gaussians(spec: str, public: Batch = PUBLIC, data: DataSpec = SPEC) -> Gaussians:
    prior = priors.fit(spec, public, data, seed=0)
    assert isinstance(prior, Gaussians)
    return prior


def densities(means: np.ndarray, covariance: np.ndarray) -> Tensor:
    """scipy's log N(x_i; mean_i, covariance) of the test inputs."""
    return torch.tensor(
        [
            stats.multivariate_normal(m, covariance).logpdf(x)
            for m, x in zip(means, X.flatten(1).numpy())
        ]
    )


def class_means() -> np.ndarray:
    return np.stack([ROWS[PUBLIC.labels == c].mean(0) for c in range(3)])


def within() -> np.ndarray:
    return ROWS - class_means()[PUBLIC.labels]


@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_gaussian_is_scipys(shrinkage: float) -> None:
    prior = gaussians(f"gaussian:shrinkage={shrinkage}")
    scatter = within().T @ within() / len(ROWS)
    covariance = (1 - shrinkage) * scatter + shrinkage * np.trace(scatter) / 16 * np.eye(16)
    reference = densities(class_means()[LABELS], covariance)
    assert torch.allclose(prior.log_prob(X, LABELS[:, None]), reference, rtol=1e-9)
    assert torch.allclose(
        prior.precision, torch.from_numpy(np.linalg.inv(covariance)), rtol=1e-8, atol=1e-8
    )
    assert np.allclose(prior.mean(LABELS).flatten(1), class_means()[LABELS])
    overall = prior.mean(4).flatten(1)
    assert np.allclose(overall, ROWS.mean(0))


def test_shrinkage_is_ledoit_and_wolfs() -> None:
    reference = LedoitWolf(assume_centered=True).fit(within()).covariance_
    found = torch.linalg.inv(gaussians("gaussian").precision).numpy()
    assert np.allclose(found, reference, rtol=1e-8)


def test_few_axes_are_the_dense_form_of_the_same_covariance() -> None:
    """The axes that are left out keep their mean variance; all of them leave nothing out."""
    prior = gaussians("gaussian:shrinkage=0.1,rank=5")
    assert prior.axes.shape == (1, 5, 16)
    u, lam, rest = prior.axes[0].numpy(), prior.variances[0].numpy(), float(prior.rest)
    dense = u.T @ np.diag(lam) @ u + rest * (np.eye(16) - u.T @ u)
    assert torch.allclose(
        prior.log_prob(X, LABELS[:, None]), densities(class_means()[LABELS], dense), rtol=1e-9
    )
    full = gaussians("gaussian:shrinkage=0.1,rank=16")
    values = full.variances[0].numpy()
    assert np.allclose(lam, values[:5])
    assert rest == pytest.approx(values[5:].mean())
    assert np.trace(dense) == pytest.approx(values.sum())


def test_rank_beyond_the_examples_changes_nothing() -> None:
    """Nine examples span eight axes: shrinkage fills the other eight evenly, exactly."""
    few = examples(SPEC, 9)
    rows = few.inputs.flatten(1)
    centred = rows - torch.stack([rows[few.labels == c].mean(0) for c in range(3)])[few.labels]
    scatter = (centred.T @ centred / 9).numpy()
    covariance = 0.8 * scatter + 0.2 * np.trace(scatter) / 16 * np.eye(16)
    found = torch.linalg.inv(gaussians("gaussian:shrinkage=0.2", few).precision)
    assert np.allclose(found, covariance, atol=1e-10)


def test_pca_is_scikit_learns() -> None:
    """Tipping & Bishop; scikit-learn's denominator is n − 1, ours n."""
    prior = gaussians("pca:rank=4")
    reference = PCA(4).fit(ROWS).get_covariance() * (119 / 120)
    assert torch.allclose(
        prior.log_prob(X), densities(np.repeat(ROWS.mean(0)[None], 6, 0), reference), rtol=1e-9
    )
    assert torch.equal(prior.log_prob(X), prior.log_prob(X, LABELS[:, None]))
    with pytest.raises(AssertionError):  # planted: the other denominator is told apart
        torch.testing.assert_close(
            prior.log_prob(X),
            densities(np.repeat(ROWS.mean(0)[None], 6, 0), reference * 120 / 119),
            rtol=1e-9,
            atol=0,
        )


def test_pca_of_full_rank_keeps_a_floor_under_variances() -> None:
    """Just outside the theory: a pixel that is constant has no variance at all."""
    images = PUBLIC.inputs.clone()
    images[..., 0, 0] = 0.5
    prior = gaussians("pca:rank=16", Batch(images, PUBLIC.labels))
    assert float(prior.variances.min()) == pytest.approx(FLOOR)
    assert bool(prior.log_prob(X).isfinite().all())


def test_mixture_of_full_rank_is_scikit_learns() -> None:
    prior = gaussians("mixture:components=3,rank=16,ridge=0.1")
    ridge = 0.1 * ROWS.var(0).sum() / 16
    scores = PCA(16, random_state=0).fit_transform(ROWS)
    model = GaussianMixture(3, reg_covar=ridge, random_state=0).fit(scores)
    mapped = PCA(16, random_state=0).fit(ROWS).transform(X.flatten(1).numpy())
    reference = torch.from_numpy(model.score_samples(mapped))
    # Given no label, classes weigh the components by responsibilities, which EM equates with the
    # weights when it has converged: 1e-3 is scikit-learn's tolerance on the likelihood.
    assert torch.allclose(prior.log_prob(X), reference, rtol=1e-3, atol=1e-2)
    assert torch.allclose(prior.given_class.sum(1), torch.ones(3, dtype=torch.float64))


def test_precision_of_a_mixture_bounds_its_information() -> None:
    """n = 20 000: v·J·v estimated from scores stays below the bound for 5 directions at ALPHA."""
    prior = gaussians("mixture:components=4,rank=8,ridge=0.1")
    x = prior.sample(20_000, generator=stream(4))[:, None].requires_grad_()
    (score,) = torch.autograd.grad(prior.log_prob(x).sum(), x)
    limit = stats.norm.isf(ALPHA / 5)
    for v in torch.randn((5, 16), generator=stream(6), dtype=torch.float64):
        squares = (score.flatten(1) @ v) ** 2
        error = float(squares.std()) / len(squares) ** 0.5
        assert float(squares.mean()) - limit * error <= float(v @ prior.precision @ v)
    single = gaussians("pca:rank=8")
    x = single.sample(20_000, generator=stream(4))[:, None].requires_grad_()
    (score,) = torch.autograd.grad(single.log_prob(x).sum(), x)
    squares = (score.flatten(1) @ torch.ones(16, dtype=torch.float64)) ** 2
    error = float(squares.std()) / len(squares) ** 0.5
    assert abs(float(squares.mean()) - float(single.precision.sum())) < limit * error


def covariance_gap(drawn: Tensor, covariance: Tensor) -> float:
    """Largest |sample covariance − covariance| in standard errors of Gaussian draws."""
    scale = covariance.diagonal()
    error = ((covariance**2 + scale[:, None] * scale) / len(drawn)).sqrt()
    return float(((drawn.T.cov() - covariance) / error).abs().max())


@pytest.mark.parametrize("spec", ["gaussian", "gaussian:rank=3", "pca:rank=3"])
def test_covariance_of_samples(spec: str) -> None:
    """n = 20 000, 136 entries: Bonferroni at ALPHA; planted, the round part is left out."""
    prior, n = gaussians(spec), 20_000
    drawn = prior.sample(torch.zeros(n, dtype=torch.int64), generator=stream(3)).flatten(1)
    covariance = torch.linalg.inv(prior.precision)
    limit = stats.norm.isf(ALPHA / 136 / 2)
    assert covariance_gap(drawn, covariance) < limit
    assert covariance_gap(drawn * 1.1, covariance) > limit


def test_box_falls_off_outside_only() -> None:
    data = DataSpec("tabular", (1,), (-1.0, 2.0), 2)
    prior = priors.fit(
        "box:softness=0.1", Batch(torch.zeros(1, 1), torch.tensor([0])), data, seed=0
    )
    x = torch.tensor([-1.2, -1.0, 0.3, 2.0, 2.1], dtype=torch.float64).reshape(5, 1, 1)
    constant = math.log(3 + 0.1 * math.sqrt(2 * math.pi))
    expected = torch.tensor([-2.0, 0, 0, 0, -0.5], dtype=torch.float64) - constant
    assert torch.allclose(prior.log_prob(x), expected)
    assert float(prior.mean(1)) == 0.5
    assert prior.sample(2, generator=stream(0)).shape == (2, 1)


def test_total_variation_counts_neighbours() -> None:
    data = DataSpec.image((1, 2, 2), 2)
    image = torch.tensor([[0.0, 1.0], [0.5, 0.25]], dtype=torch.float64).reshape(1, 1, 1, 2, 2)
    public = Batch(torch.rand(1, 1, 2, 2), torch.tensor([0]))
    plain = priors.fit("tv:weight=2", public, data, seed=0).log_prob(image)
    assert float(plain) == pytest.approx(-2 * (0.5 + 0.75 + 1 + 0.25))
    squared = priors.fit("tv:weight=2,differences=squared", public, data, seed=0).log_prob(image)
    # A side of two wraps around onto itself: every pair counts twice.
    assert float(squared) == pytest.approx(-2 * 2 * (0.25 + 0.5625 + 1 + 0.0625))
    assert float(priors.fit("tv", public, data, seed=0).log_prob(torch.ones(1, 1, 1, 2, 2))) == 0


def test_fitted_weight_of_total_variation_is_the_maximum_of_the_likelihood() -> None:
    """log p(Δ) = n log(weight / 2) − weight Σ|Δ| for Laplace, n/2 log(weight/π) − weight ΣΔ²."""
    for spec, density in (
        ("tv", lambda w, d: stats.laplace(scale=1 / w).logpdf(d).sum()),
        ("tv:differences=squared", lambda w, d: stats.norm(scale=(2 * w) ** -0.5).logpdf(d).sum()),
    ):
        prior = priors.fit(spec, PUBLIC, SPEC, seed=0)
        weight = float(prior.tensors["weight"])
        images = PUBLIC.inputs
        if spec == "tv":
            gaps = torch.cat([images.diff(dim=-1).flatten(), images.diff(dim=-2).flatten()])
        else:
            gaps = torch.cat([(images - images.roll(-1, axis)).flatten() for axis in (-1, -2)])
        best = density(weight, gaps.numpy())
        assert best > density(weight * 1.01, gaps.numpy())
        assert best > density(weight * 0.99, gaps.numpy())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("box:softness=0", "softness=0.0: expected a positive number"),
        ("tv:weight=-1", "weight=-1.0: expected a positive number"),
        ("tv:differences=cubic", "expected one of: absolute, squared"),
        ("gaussian:shrinkage=nan", "shrinkage=nan: expected a share"),
        ("gaussian:rank=0", "rank=0: expected a whole number"),
        ("mixture:components=0", "components=0"),
        ("mixture:ridge=inf", "ridge=inf"),
        ("gausian", "did you mean 'gaussian'"),
        ("pca:ranks=2", "did you mean 'rank'"),
    ],
)
def test_values_that_make_no_sense(spec: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        priors.fit(spec, PUBLIC, SPEC, seed=0)


def test_total_variation_needs_images_that_vary() -> None:
    table = DataSpec("tabular", (2,), (0.0, 1.0), 2)
    with pytest.raises(InvalidInput, match="expected images"):
        priors.fit("tv", examples(table, 4), table, seed=0)
    grey = Batch(torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1]))
    with pytest.raises(InvalidInput, match="are constant"):
        priors.fit("tv", grey, SPEC, seed=0)


def test_a_class_weighs_components_by_its_own_examples() -> None:
    """Two far groups that are the classes: with the label known, one component is enough."""
    draw = stream(2)
    labels = torch.arange(40) % 2
    images = 0.02 * torch.randn((40, 1, 4, 4), generator=draw) + labels.reshape(-1, 1, 1, 1)
    data = DataSpec.image((1, 4, 4), 2)
    prior = gaussians("mixture:components=2,rank=2", Batch(images, labels), data)
    assert torch.allclose(prior.given_class.sort().values, torch.tensor([[0.0, 1.0]]).double())
    assert float(prior.mean(torch.tensor([1])).mean()) == pytest.approx(1, abs=0.02)
    assert float(prior.mean(1).mean()) == pytest.approx(0.5, abs=0.02)
