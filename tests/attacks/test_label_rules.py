"""Rules of label recovery: exact where their theory says so, silent just outside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gradleak as gl
from gradleak.attacks.labels import LABEL_RULES, LabelRule, build
from gradleak.attacks.labels.rule import apportioned
from gradleak.attacks.labels.soft_labels import SoftLabels
from gradleak.attacks.parts.labels import greedy
from gradleak.data import load
from gradleak.errors import InvalidInput, NotApplicable
from gradleak.mechanisms import FedAvg, FedSGD
from gradleak.models.seeding import seeded
from gradleak.types import Batch, Mechanism, ModelState, Observation
from tests.laws.small import stream

SPEC = load("digits").spec
COUNTING = [name for name, rule in LABEL_RULES.items() if rule.about.claims == "counts"]
NAMING = [name for name, rule in LABEL_RULES.items() if rule.about.claims == "set"]


class Constant(nn.Module):
    """Features that no input changes: every rule's theory holds."""

    def __init__(self, *, bias: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(12, SPEC.classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.ones(len(x), 12, dtype=x.dtype) + 0 * x.flatten(1)[:, :12])


def network(
    activation: type[nn.Module] = nn.ReLU, *, bias: bool = True, width: int = 48
) -> nn.Sequential:
    with seeded(4):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            activation(),
            nn.Linear(width, SPEC.classes, bias=bias),
        )


def seen_of(
    model: nn.Module, labels: Tensor, *, seed: int = 0, mechanism: Mechanism | None = None
) -> Observation:
    """What a server sees of random pictures with these labels, in float64."""
    mechanism = mechanism or FedSGD()
    state = ModelState.of(model.double())
    inputs = torch.rand((len(labels), *SPEC.shape), generator=stream(seed), dtype=torch.float64)
    update = mechanism.sample(state, Batch(inputs, labels), generator=stream(seed))
    return gl.observe(
        state,
        update=dict(update.values),
        kind=update.kind,
        mechanism=mechanism,
        data=SPEC,
        batch_size=len(labels),
    )


def counted(labels: Tensor) -> Tensor:
    return labels.bincount(minlength=SPEC.classes)


@pytest.mark.parametrize("name", [name for name in COUNTING if name != "separated-head"])
@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_counts_are_exact_where_all_inputs_look_alike(name: str, size: int) -> None:
    with seeded(1):
        model = Constant()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    for seed in range(5):
        labels = torch.randint(SPEC.classes, (size,), generator=stream(seed))
        if name in ("llg", "bias-llg"):  # their impact is exact for one class alone
            labels = labels[:1].expand(size)
        found = build(name)(seen_of(model, labels, seed=seed), generator=stream(9))
        assert torch.equal(found, counted(labels)), (found, counted(labels))


@pytest.mark.parametrize("name", NAMING)
def test_one_example_of_a_rectified_network_is_named(name: str) -> None:
    for label in range(SPEC.classes):
        labels = torch.tensor([label])
        found = build(name)(seen_of(network(), labels, seed=label), generator=stream(9))
        assert torch.equal(found, counted(labels))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_rlg_names_every_class_present_whatever_the_activation(
    activation: type[nn.Module],
) -> None:
    for seed in range(5):
        labels = torch.randperm(SPEC.classes, generator=stream(seed))[:5]
        found = build("rlg")(seen_of(network(activation), labels, seed=seed), generator=stream(9))
        assert (found[labels] == 1).all()


@pytest.mark.parametrize("name", COUNTING)
def test_untrained_networks_are_counted_far_better_than_guessed(name: str) -> None:
    """20 batches of 8 random labels; guessing overlaps by half (0.5 to 0.6 in simulation)."""
    overlaps = []
    for seed in range(20):
        labels = torch.randint(SPEC.classes, (8,), generator=stream(seed))
        found = build(name)(seen_of(network(), labels, seed=seed), generator=stream(9))
        assert int(found.sum()) == 8
        overlaps.append(float(torch.minimum(found, counted(labels)).sum()) / 8)
    assert sum(overlaps) / 20 > 0.8


def test_a_separated_head_is_exact_where_predictions_are_far_from_uniform() -> None:
    """Logits far apart: closed forms of untrained networks are wrong, this one is not."""
    wrong = 0
    for seed in range(5):
        model = network(width=1000)
        with torch.no_grad():
            model[3].weight.mul_(200)
            model[1].bias.sub_(0.5)  # fewer units lit by several examples
        labels = torch.randint(SPEC.classes, (6,), generator=stream(seed))
        seen = seen_of(model, labels, seed=seed)
        assert torch.equal(build("separated-head")(seen, generator=stream(9)), counted(labels))
        wrong += not torch.equal(build("bias-counts")(seen, generator=stream(9)), counted(labels))
    assert wrong > 0


@pytest.mark.parametrize("name", [n for n, r in LABEL_RULES.items() if r.about.claims != "soft"])
def test_every_rule_claims_no_more_than_the_batch_holds(name: str) -> None:
    """Whatever the network and the labels: no negative count, no more than b in all."""
    rule = build(name)
    for seed in range(6):
        size = int(torch.randint(1, 9, (), generator=stream(seed)))
        labels = torch.randint(SPEC.classes, (size,), generator=stream(seed))
        activation = (nn.ReLU, nn.Tanh)[seed % 2]
        try:
            found = rule(seen_of(network(activation), labels, seed=seed), generator=stream(9))
        except NotApplicable:
            continue
        assert found.dtype == torch.int64
        assert found.shape == (SPEC.classes,)
        assert (found >= 0).all()
        assert int(found.sum()) <= size


@pytest.mark.parametrize("name", LABEL_RULES)
def test_rules_need_a_batch_size_and_a_head(name: str) -> None:
    seen = seen_of(network(), torch.tensor([1]))
    nameless = replace(seen, knowledge=replace(seen.knowledge, batch_size=None))
    with pytest.raises(NotApplicable, match="batch size"):
        build(name)(nameless, generator=stream(9))
    with seeded(0):
        headless = nn.Sequential(network(), nn.LayerNorm(SPEC.classes))
    with pytest.raises(NotApplicable, match="head"):
        build(name)(seen_of(headless, torch.tensor([1])), generator=stream(9))


@pytest.mark.parametrize("name", ["bias-llg", "bias-counts", "bias-zlg", "ilrg"])
def test_rules_of_the_bias_need_one(name: str) -> None:
    with pytest.raises(NotApplicable, match="bias"):
        build(name)(seen_of(network(bias=False), torch.tensor([1, 2])), generator=stream(9))


@pytest.mark.parametrize("name", LABEL_RULES)
def test_an_update_without_gradient_is_not_applicable(name: str) -> None:
    seen = seen_of(network(), torch.tensor([1]))
    values = {k: 0 * v for k, v in seen.update.values.items()}
    exchange = replace(seen.exchanges[0], update=replace(seen.update, values=values))
    with pytest.raises(NotApplicable, match="zero"):
        build(name)(replace(seen, exchanges=(exchange,)), generator=stream(9))


def test_rlg_has_nothing_to_say_of_as_many_examples_as_classes() -> None:
    with pytest.raises(NotApplicable, match="separable"):
        build("rlg")(seen_of(network(), torch.arange(10)), generator=stream(9))


def test_local_training_is_counted_through_its_mean_gradient() -> None:
    labels = torch.tensor([1, 1, 1, 7, 7, 2, 2, 2])
    seen = seen_of(network(), labels, mechanism=FedAvg(steps=3, learning_rate=0.01))
    assert torch.equal(build("bias-zlg")(seen, generator=stream(9)), counted(labels))


def soft(kind: str, seed: int) -> Tensor:
    first, second = torch.randperm(SPEC.classes, generator=stream(seed))[:2].tolist()
    label = torch.zeros(1, SPEC.classes, dtype=torch.float64)
    if kind == "mixup":
        label[0, first], label[0, second] = 0.7, 0.3
    else:
        label += 0.1 / SPEC.classes
        label[0, first] += 0.9
    return label


@pytest.mark.parametrize("kind", ["mixup", "smoothing"])
def test_soft_labels_without_a_bias(kind: str) -> None:
    rule: LabelRule = SoftLabels(kind=kind)
    for seed in range(10):
        label = soft(kind, seed)
        found = rule(seen_of(network(bias=False), label, seed=seed), generator=stream(9))
        torch.testing.assert_close(found, label, rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_any_soft_label_with_a_bias(activation: type[nn.Module]) -> None:
    for seed in range(5):
        label = torch.rand((1, SPEC.classes), generator=stream(seed), dtype=torch.float64)
        label /= label.sum()
        found = build("soft-labels")(
            seen_of(network(activation), label, seed=seed), generator=stream(9)
        )
        torch.testing.assert_close(found, label, rtol=0, atol=1e-9)


def test_soft_labels_of_two_examples_are_not_claimed() -> None:
    with pytest.raises(NotApplicable, match="one example"):
        build("soft-labels")(seen_of(network(), torch.tensor([1, 2])), generator=stream(9))
    seen = seen_of(network(), torch.tensor([1, 2]))
    told_one = replace(seen, knowledge=replace(seen.knowledge, batch_size=1))
    with pytest.raises(NotApplicable, match="not that of one example"):
        build("soft-labels")(told_one, generator=stream(9))


def test_unknown_rules_name_the_nearest() -> None:
    with pytest.raises(InvalidInput, match="bias-zlg"):
        build("bias-zgl")


def test_apportioning_keeps_the_sum_and_never_goes_below_zero() -> None:
    assert apportioned(torch.tensor([2.6, 1.4, -3.0]), 4).tolist() == [3, 1, 0]
    assert apportioned(torch.tensor([0.0, 0.0]), 3).tolist() == [2, 1]


def test_greedy_counts_by_the_class_it_chose() -> None:
    """The published code of a peer subtracts from another class and repeats one for ever."""
    signal = torch.tensor([-0.5, 0.3, -0.2], dtype=torch.float64)
    assert greedy(signal, torch.tensor(-0.2, dtype=torch.float64), 4).tolist() == [3, 0, 1]
