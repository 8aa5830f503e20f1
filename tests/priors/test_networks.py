"""Networks as priors: resumed exactly, folded exactly, and honest about their examples."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from gradleak import priors
from gradleak.data import load
from gradleak.errors import InvalidInput
from gradleak.priors import Generator, Manifold, Network
from gradleak.priors.network import Trainable, fingerprints, train
from gradleak.types import Batch, DataSpec
from tests.laws.elsewhere import ELSEWHERE, Elsewhere
from tests.laws.small import SMALL_PRIORS, SPEC, stream
from tests.priors.test_laws import examples

PUBLIC = priors.prepared(examples(SPEC, 90), SPEC)


def family(name: str) -> Trainable:
    return priors.build(SMALL_PRIORS[name])  # type: ignore[return-value]


def trained(name: str) -> Network:
    return train(family(name), PUBLIC, SPEC, seed=0)


@pytest.mark.parametrize("name", SMALL_PRIORS)
def test_a_training_that_is_killed_ends_where_an_unbroken_one_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, and the second run does only what is left."""
    monkeypatch.setattr("gradleak.priors.network._SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    checkpoint, steps = tmp_path / "training", family(name).steps

    def killed(done: int, total: int) -> None:
        if done == steps // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(family(name), PUBLIC, SPEC, seed=0, checkpoint=checkpoint, progress=killed)
    told: list[int] = []
    resumed = train(
        family(name), PUBLIC, SPEC, seed=0, checkpoint=checkpoint,
        progress=lambda done, total: told.append(done),
    )  # fmt: skip
    assert told == list(range(steps // 2 + 1, steps + 1))
    assert priors.digest(resumed) == priors.digest(trained(name))
    other = train(family(name), PUBLIC, SPEC, seed=1, checkpoint=checkpoint)  # another training
    assert priors.digest(other) == priors.digest(train(family(name), PUBLIC, SPEC, seed=1))
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    damaged = train(family(name), PUBLIC, SPEC, seed=0, checkpoint=checkpoint)
    assert priors.digest(damaged) == priors.digest(resumed)


@pytest.mark.parametrize("device", [ELSEWHERE, torch.device("cuda")], ids=str)
@pytest.mark.parametrize("name", SMALL_PRIORS)
def test_a_training_goes_on_with_another_device(
    name: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun elsewhere and ended on the CPU: what the CPU finds, but for rounding."""
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr("gradleak.priors.network._SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    steps = family(name).steps

    def killed(done: int, total: int) -> None:
        if done == steps // 2:
            raise KeyboardInterrupt

    kept = {"seed": 0, "checkpoint": tmp_path / "training"}
    with pytest.raises(KeyboardInterrupt), Elsewhere() if device == ELSEWHERE else nullcontext():
        train(family(name), PUBLIC, SPEC, **kept, progress=killed, device=device)
    found, want = train(family(name), PUBLIC, SPEC, **kept).weights, trained(name).weights
    for key, value in want.items():
        torch.testing.assert_close(found[key], value, atol=1e-3, rtol=1e-3)


def test_training_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    trained("gan")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_folded_normalisation_is_the_network_in_evaluation_mode() -> None:
    """The kept weights draw what the normalised network draws with the same statistics."""
    training = family("gan").begin(SPEC, seed=0)
    for step in range(3):
        training.step(PUBLIC.inputs[:8].float(), PUBLIC.classes[:8], generator=stream(step))
    weights = training.weights()
    prior = Generator.of(family("gan"), SPEC, {**weights, "examples": torch.zeros(1).long()})
    z = torch.randn((128, 3), generator=stream(0))
    network = training.modules["average"]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(16):
            network(torch.randn((128, 3), generator=source, dtype=torch.float64).float())
        drawn = (network.eval()(z) + 1) / 2
    assert torch.allclose(prior.images(z), drawn, atol=1e-5)
    assert not torch.allclose(prior.images(z + 0.1), drawn, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 9, 14), (1, 28, 28), (3, 40, 40)])
def test_generators_draw_pictures_of_any_size(shape: tuple[int, int, int]) -> None:
    data = DataSpec.image(shape, 2)
    public = Batch(torch.rand((4, *shape), generator=stream(1)), torch.arange(4) % 2)
    prior = priors.fit("gan:steps=1,channels=2,latent=3,batch_size=4", public, data, seed=0)
    assert isinstance(prior, Generator)
    drawn = prior.sample(3, generator=stream(0))
    assert drawn.shape == (3, *shape)
    assert 0 <= float(drawn.min()) <= float(drawn.max()) <= 1


def test_copies_of_the_weights_draw_what_the_weights_draw() -> None:
    prior = trained("gan")
    assert isinstance(prior, Generator)
    z = torch.randn((2, 3, 3), generator=stream(0))
    copies = {k: v.expand(2, 3, *v.shape).clone() for k, v in prior.weights.items()}
    assert torch.allclose(prior.images(z, copies), prior.images(z), atol=1e-6)
    copies["0.bias"][1, 2] += 1  # one picture's own copy changes that picture alone
    changed = (prior.images(z, copies) - prior.images(z)).abs().flatten(2).amax(2) > 1e-4
    assert changed.nonzero().tolist() == [[1, 2]]


def test_the_nearest_latent_of_a_drawn_picture_draws_it_again() -> None:
    """Another sample misses by the spread of samples; the search comes within a quarter of it."""
    prior = priors.load(priors.TRAINED["gan-fashion-mnist"])
    assert isinstance(prior, Generator)
    drawn = prior.sample(4, generator=stream(3)).float()
    spread = F.mse_loss(prior.sample(4, generator=stream(4)).float(), drawn)
    assert F.mse_loss(prior.images(prior.nearest(drawn)), drawn) < 0.25 * spread


def test_an_autoencoder_tells_its_data_from_noise() -> None:
    """Examples on a line through the cube; noise has the same marginals."""
    along = torch.rand((200, 1), generator=stream(0))
    lines = (torch.linspace(0, 1, 16) * along).reshape(200, 1, 4, 4)
    public = Batch(lines, torch.arange(200) % 3)
    prior = priors.fit("autoencoder:steps=300,hidden=32,code=2", public, SPEC, seed=0)
    assert isinstance(prior, Manifold)
    noise = lines.flatten()[torch.randperm(200 * 16, generator=stream(1))].reshape(lines.shape)
    own, other = (float(prior.anomaly(x[:, None]).mean()) for x in (lines, noise))
    assert own < other / 5
    x = noise[:3, None].double()
    entries, error = 16, float(prior.weights["error"])
    assert torch.allclose(prior.log_prob(x), -entries * prior.anomaly(x) / (2 * error))


def test_fingerprints_know_a_picture_in_any_type_and_order() -> None:
    digits = load("digits")
    batch = digits.batch(torch.arange(20))
    prior = priors.fit(SMALL_PRIORS["gan"], batch, digits.spec, seed=0)
    assert isinstance(prior, Network)
    again = digits.batch(torch.tensor([19, 700, 3]))
    for inputs in (again.inputs, again.inputs.double()):
        assert prior.seen(inputs).tolist() == [True, False, True]
    assert not prior.seen(again.inputs + 1 / 255).any()
    assert fingerprints(again.inputs, digits.spec).unique().numel() == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gan:steps=0", "steps=0: expected a whole number"),
        ("gan:averaging=1", "averaging=1.0: expected a share"),
        ("gan:learning_rate=nan", "learning_rate=nan: expected a positive number"),
        ("autoencoder:code=0", "code=0"),
    ],
)
def test_values_that_make_no_sense(spec: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        priors.build(spec)


def test_a_gan_needs_images() -> None:
    table = DataSpec("tabular", (2,), (0.0, 1.0), 2)
    with pytest.raises(InvalidInput, match="expected images"):
        priors.fit("gan:steps=1", examples(table, 4), table, seed=0)


@pytest.mark.parametrize("name", priors.TRAINED)
def test_shipped_weights_are_small_and_come_with_a_card(name: str) -> None:
    path = priors.TRAINED[name]
    assert path.stat().st_size < 8_000_000
    prior = priors.load(path)
    assert isinstance(prior, Network)
    card = path.with_suffix(".md").read_text()
    assert f"gradleak prior train {prior.id}" in card
    assert priors.digest(prior) in card
    assert path.with_suffix(".png").exists()
