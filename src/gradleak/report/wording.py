"""Findings in plain words: every sentence of the report that carries a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]

VERDICTS = {
    "leaks": "Leaks",
    "inconclusive": "Inconclusive",
    "protected": "Protected",
    "untested": "Not tested",
}
STATES = {
    "unscored": "Claimed, not scored",
    "not_applicable": "Not applicable",
    "not_run": "Not run",
    "error": "Failed to run",
}
FACTS = {
    "mechanism": "the protection and its parameters",
    "batch_size": "how many examples are in the batch",
    "labels": "the labels of the batch",
    "bn_statistics": "the batch's batch-normalisation statistics",
    "minibatch_order": "which examples every local step, or every vertical round, visits",
    "prior": "a prior of the data, fitted to public examples",
    "timesteps": "which step of the noise schedule every image was drawn at",
    "noise": "the noise that was added to every image",
}
SERVERS = {
    "honest": "Honest but curious: the server follows the protocol and studies what it receives.",
    "malicious": "Malicious: the server may also alter the model that it broadcasts.",
}
VIEWS = {
    "client": "It sees the update of each client on its own: no secure aggregation.",
    "aggregate": "It sees only the sum of the clients' updates, and knows how many took part.",
}
MECHANISMS = {
    "fedsgd": "the gradient of one batch",
    "fedavg": "the change of the weights after local training",
    "denoising": "the gradient of a diffusion model's loss on one batch",
    "denoising-fedavg": "the change of a diffusion model's weights after local training",
    "vertical": "the gradient of every round of vertical training",
}


def number(value: object, digits: int = 1) -> str:
    """Write a number for a reader: a dash when absent, ∞ and "undefined" when not finite."""
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def significant(value: object, digits: int = 3) -> str:
    """Write a number with a few significant digits, for quantities of unknown scale."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return f"{value:.{digits}g}".replace("-", "−")
    return number(value)


def percent(value: object) -> str:
    """Write a share as a percentage, with a decimal only where it is below 1 %."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return number(value)
    return f"{number(100 * value, 1 if 0 < abs(value) < 0.01 else 0)} %"


def decibels(value: object) -> str:
    """Write a PSNR with its unit."""
    text = number(value)
    return text if text in ("–", "undefined") else f"{text} dB"


def interval(m: Json, *, write: Any = number) -> str:
    """Write an interval as "low to high"."""
    return f"{write(m.get('low'))} to {write(m.get('high'))}"


def plural(count: int, one: str, many: str = "") -> str:
    """Write a count with its noun."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def listing(words: Sequence[str], last: str = "and") -> str:
    """Join words as prose does."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def seconds(value: object) -> str:
    """Write a duration."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "–"
    if value < 10:
        return f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def attack(finding: Json) -> str:
    """The attack, and whether it did not know of the protection that it met."""
    aware = finding.get("adaptive", True) or finding["defense"] == "none"
    return str(finding["attack"]) + ("" if aware else " (unaware)")


def protection(spec: str) -> tuple[str, str]:
    """Split a protection's specification, perhaps a chain joined by +, into title and settings."""
    if spec == "none":
        return "No protection", ""
    names, settings = [], []
    for part in spec.split("+"):
        name, _, fields = part.partition(":")
        names.append(name)
        settings += [field.replace("=", " = ") for field in fields.split(",") if field]
    return " + ".join(names), ", ".join(settings)


def setting(scenario: Json) -> str:
    """Describe data, model, stage, mechanism and batch size in one line."""
    parts = [f"{scenario.get('data')}, {scenario.get('model')}"]
    if scenario.get("stage") is not None:
        parts.append(f"stage {scenario['stage']}")
    if scenario.get("mechanism"):
        parts.append(str(scenario.get("mechanism_spec") or scenario["mechanism"]))
    if scenario.get("batch_size"):
        parts.append(f"batch {scenario['batch_size']}")
    if scenario.get("clients"):
        parts.append(f"sum of {plural(scenario['clients'], 'client')}")
    return " · ".join(parts)


def recovered_counts(finding: Json) -> tuple[int, int]:
    """Count the recovered images and all images; targets where images were not counted."""
    trials = finding.get("trials") or {}
    if "images" in trials:
        return trials.get("recovered_images", 0), trials["images"]
    return trials.get("solved", 0), trials.get("run", 0)


def reason(finding: Json) -> str:
    """The recorded reason of a verdict as a sentence, or the count of recovered images."""
    counted = "{} of {} images recovered".format(*recovered_counts(finding))
    return f"{str(finding.get('reason') or counted).rstrip('.')}."


def figures(psnr: Json) -> str:
    """Write a mean PSNR with its interval beside guess and control."""
    return (
        f"Mean PSNR {decibels(psnr.get('value'))} ({interval(psnr)}); "
        f"guess {number(psnr.get('baseline'))}, control {number(psnr.get('control'))}"
    )


def accounted(epsilon: Mapping[str, float | None]) -> str:
    """Write what the accountants say of ε."""
    known = [f"{significant(v)} ({k})" for k, v in epsilon.items() if v is not None]
    return f"ε = {listing(known)}" if known else "an ε that needs Opacus: gradleak[dp]"


def verdict_title(counts: Mapping[str, int]) -> str:
    """Summarise the verdicts of the protections, "none" left out, as a heading."""
    total = sum(counts.values())
    if not total:
        return "No protection was compared"
    verbs = {
        "leaks": ("leaks", "leak"),
        "inconclusive": ("is inconclusive", "are inconclusive"),
        "protected": ("withstands these attacks", "withstand these attacks"),
        "untested": ("was not tested", "were not tested"),
    }
    parts = [f"{n} {verbs[v][n > 1]}" for v, n in counts.items() if n]
    if len(parts) == 1 and total > 1:
        return f"All {total} protections {parts[0].partition(' ')[2]}"
    return f"Of {plural(total, 'protection')}, {listing(parts)}"


BATCH_NORM = {
    "running": "It takes the running estimates of batch normalisation for the batch's statistics.",
    "none": "It does not know how the client normalises batches and assumes evaluation mode.",
}


def threat(model: Json) -> list[str]:
    """Describe a threat model in plain sentences."""
    knows = [str(fact) for fact in model.get("knows", ())]
    sentences = [SERVERS[model.get("server", "honest")], VIEWS[model.get("view", "client")]]
    if model.get("colluding"):
        sentences.append(
            f"{plural(model['colluding'], 'client')} of every sum "
            f"{'tells' if model['colluding'] == 1 else 'tell'} it the update sent, which it "
            "subtracts."
        )
    words = [FACTS.get(fact, fact) for fact in knows]
    sentences.append(
        f"Besides the broadcast model and the update, it knows {listing(words)}."
        if words
        else "It knows the broadcast model and the update, and nothing else."
    )
    if (proxy := BATCH_NORM.get(model.get("batch_norm", ""))) is not None:
        sentences.append(proxy)
    unknown = [words for fact, words in FACTS.items() if fact not in knows]
    if unknown:
        sentences.append(f"It does not know {listing(unknown, 'or')}.")
    return sentences


DEFINITIONS: tuple[tuple[str, str], ...] = (
    (
        "PSNR (dB)",
        "Peak signal-to-noise ratio, 10 log₁₀(1 / mean squared error), for inputs in [0, 1] with "
        "the claim clamped to that range. Higher leaks more. From about 20 dB people recognise "
        "the image; above 40 dB the two look the same.",
    ),
    (
        "Guess",
        "The score of a guess made without any update: the mean image of the class where labels "
        "are known, the mean public image otherwise. An attack that does not beat it shows "
        "nothing.",
    ),
    (
        "Control",
        "The same attack on the update of an unrelated client, scored against this target. What "
        "it reaches is the attack's habit, not leakage.",
    ),
    (
        "Identified",
        "Share of private images that are nearer (L2) to their reconstruction than the other "
        "candidates in a bank of M. Chance is batch size / M. A blurred image can still identify.",
    ),
    (
        "Excess",
        "(attack − control) / (1 − control) for the share identified: the part of the success "
        "that the update itself explains. 0 % is none, 100 % is all.",
    ),
    (
        "Recovered",
        "An image with a PSNR of at least 20 dB that is identified and at least 3 dB above guess "
        "and control. A target (one client's update) is recovered when half of its images are.",
    ),
    ("SSIM", "Structural similarity, up to 1 for equal images; 0 for unrelated ones."),
    (
        "Labels",
        "Share of the private labels recovered, order ignored; a dash where training uses none.",
    ),
    (
        "n and intervals",
        "n counts the targets. One that failed, diverged or found no solution stays in n and "
        "scores what the guess scores. Intervals are at the confidence stated (95 %) and clustered "
        "by client, as images of one client are not independent.",
    ),
    (
        "Optimiser-limited",
        "A miss where the attack's own objective prefers the truth to the claim: the search "
        "stopped short, and a better one may succeed. It says nothing about safety.",
    ),
    (
        "Information-limited",
        "A miss where the claim fits the update at least as well as the truth does: more search "
        "with this attack would not help. The only kind of miss that speaks for a protection.",
    ),
    (
        "Unattributed, no claim",
        "A miss without two finite objectives to compare; a target for which the attack failed, "
        "diverged or found no solution. Neither says anything about safety.",
    ),
    (
        "Leaks",
        "Images are recovered and the control does not recover as many, or identification beats "
        "chance, control and guess in exact tests over clients.",
    ),
    (
        "Protected",
        "Nothing leaks; the attack knew the protection and leaks the same setting without it; at "
        "least 8 clients; every miss is information-limited; no sanity warning; and with 95 % "
        "confidence fewer than half of the images are identified. It covers the attacks tested: "
        "it is no proof.",
    ),
    ("Inconclusive", "Neither of the two; the reason names the first condition that fails."),
    (
        "Proved limit",
        "The share that no attack can identify more often, by differential privacy of one clipped "
        "update with Gaussian noise; it starts from what a guess achieves. An attack breaks it "
        "when its whole 99.8 % interval lies beyond. The auditor's: no attack sees it.",
    ),
    (
        "Foretold error",
        "Trace of the inverse of Fisher information plus prior precision, per entry: the mean "
        "squared error if the posterior were Gaussian at the truth. A score of the auditor's.",
    ),
)
