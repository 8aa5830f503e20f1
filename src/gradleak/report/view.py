"""What the page says: findings arranged in the order in which a reader meets them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from markupsafe import Markup

from gradleak.report import charts, costs, pictures, proofs, twins, wording
from gradleak.report.findings import RECOVERED_PSNR_DB, verdict_by_defense
from gradleak.report.pictures import Picture
from gradleak.report.tradeoff import Tradeoff
from gradleak.report.wording import Json

_T = TypeVar("_T")

STRIPS = 400
"""Targets pictured in the details, over all findings: keeps the file within a few megabytes."""
ROWS = 100
"""Targets listed in the details of one finding."""
GALLERIES = 12
"""Protections pictured before the rest is folded away."""
CLAUSES = 4
"""Clauses of the headline after the first that the opening repeats."""

SUMS = (
    "Mean PSNR, and the share of images identified, with intervals, by the strongest attack at "
    "each point. Attacks that fall short on a large sum say nothing about safety unless their "
    "misses are information-limited."
)
"""What the curve over honest clients shows."""

_ORDER = ("leaks", "inconclusive", "protected", "untested")
_BROKEN = ("failed", "diverged", "no_solution")


@dataclass(frozen=True, slots=True)
class Shown:
    """A target in pictures: role ("Worst"), caption, and one labelled picture per column."""

    role: str
    caption: str
    columns: tuple[tuple[str, str, Picture, str], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A target in the details of a finding."""

    cells: tuple[str, ...]
    picture: Picture | None
    alt: str


class Finding:
    """One attack against one protection in one setting, ready to be written down."""

    def __init__(self, raw: Json, directory: Path) -> None:
        self.raw = raw
        self.id: str = raw["id"]
        self.attack = wording.attack(raw)
        self.spec: str = raw.get("defense_spec") or raw["defense"]
        self.name, self.fields = wording.protection(self.spec)
        self.setting = wording.setting(raw["scenario"])
        self.state: str = raw["state"]
        self.measured = self.state in ("measured", "inconclusive")
        verdict = raw.get("verdict") or "inconclusive"
        self.verdict: str = verdict if self.measured else "untested"
        self.word = wording.STATES.get(self.state) or wording.VERDICTS[self.verdict]
        self.m: dict[str, Json] = dict(raw.get("measurements") or {})
        self.psnr: Json = self.m.get("psnr_db", {})
        self.targets: list[Json] = list(raw.get("targets") or ())
        self.trials: Json = raw.get("trials") or {}
        self.batch = int(raw["scenario"].get("batch_size") or 1)
        self.batch *= int(raw["scenario"].get("honest_clients") or 1)
        self._directory = directory

    @property
    def strength(self) -> tuple[bool, float, float, float]:
        """Rank among attacks: verdict, recovered share, identified share, mean PSNR."""
        recovered, images = wording.recovered_counts(self.raw)
        return (
            self.verdict == "leaks",
            recovered / max(images, 1),
            _finite(self.m.get("identified", {}).get("value")),
            _finite(self.psnr.get("value")),
        )

    @property
    def figures(self) -> str:
        """The PSNR beside its references, in words."""
        return wording.figures(self.psnr)

    @property
    def strip(self) -> Markup:
        """The PSNR interval as a small chart."""
        p = self.psnr
        return charts.interval_strip(
            p.get("value"), p.get("low"), p.get("high"), p.get("control"), p.get("baseline")
        )

    @property
    def identified(self) -> Json | None:
        """Identification with the count behind the share, or None when it was not measured."""
        m = self.m.get("identified")
        if not m or not m.get("n"):
            return None
        scores = [t.get("scores") or {} for t in self.targets]
        flags = [x for each in scores for x in _floats(each.get("identified"))]
        count = _count(flags) if flags else wording.percent(m.get("value"))
        return {"bank_size": None, "chance": None, "excess": None, **m, "count": count}

    @property
    def excess(self) -> Json:
        """Excess success of identification over the control, with its interval."""
        return (self.identified or {}).get("excess") or {"value": None}

    @property
    def images(self) -> str:
        """Recovered images, in words."""
        return "{} of {}".format(*wording.recovered_counts(self.raw))

    @property
    def fates(self) -> list[tuple[str, str, int]]:
        """What became of the targets, as (class, words, count); the counts sum to those run."""
        missed = self.raw.get("missed") or {}
        broken = sum(self.trials.get(fate, 0) for fate in _BROKEN)
        known = [
            ("recovered", "recovered", self.trials.get("solved", 0)),
            ("optimiser", "optimiser-limited", missed.get("optimiser_limited", 0)),
            ("information", "information-limited", missed.get("information_limited", 0)),
            ("broken", "without a claim", broken),
        ]
        rest = self.trials.get("run", 0) - sum(count for _, _, count in known)
        known.insert(3, ("unattributed", "unattributed", max(rest, 0)))
        return [fate for fate in known if fate[2]]

    @property
    def fates_bar(self) -> Markup:
        """`fates` as a bar."""
        return charts.stacked_bar(
            [(css, count) for css, _, count in self.fates],
            name=f"{self.name}, {self.attack}: {self.fates_words}",
        )

    @property
    def fates_words(self) -> str:
        """`fates` in words."""
        return ", ".join(f"{count} {words}" for _, words, count in self.fates)

    def target_psnr(self) -> list[float]:
        """Mean PSNR of each target in dB."""
        return [_mean(self._psnr(target)) for target in self.targets]

    def image_psnr(self, source: str) -> list[float]:
        """PSNR in dB of every private image for "scores", "control", "guess" or "ceiling"."""
        each = {"scores": self._psnr, "guess": _guess}.get(source, partial(_beside, source=source))
        return [value for target in self.targets for value in each(target)]

    def _psnr(self, target: Json) -> list[float]:
        return _floats((target.get("scores") or {}).get("psnr_db")) or [math.nan] * self.batch

    def curve(self, *, beside: Finding | None) -> Markup | None:
        """The risk curve, with that of `beside` for comparison."""
        attack = self.image_psnr("scores")
        if not attack:
            return None
        above = sum(value > RECOVERED_PSNR_DB for value in attack)
        return charts.risk_curve(
            attack,
            self.image_psnr("control"),
            self.image_psnr("guess"),
            beside.image_psnr("scores") if beside else None,
            begun=self.image_psnr("ceiling"),
            proved=self.proved_risk,
            name=f"{self.name}, {self.attack}: {above} of {len(attack)} private images exceed "
            f"20 dB; median {wording.decibels(_median(attack))}",
        )

    @property
    def proved_risk(self) -> list[float]:
        """The largest possible share of images above 0, 1, 2 … dB; empty where none is proved."""
        found = (limit.get("risk") for limit in self.raw.get("limits") or ())
        return next((_floats(risk) for risk in found if risk), [])

    def gallery(self) -> tuple[list[Shown], str]:
        """The worst, median and random target in pictures, and why there are none."""
        psnr = self.target_psnr()
        stored = self._stored()
        if stored.problem:
            return [], stored.problem
        chosen = pictures.chosen(psnr, key=self.id)
        return [self.shown(role, index, stored) for role, index in chosen], ""

    def shown(self, role: str, index: int, stored: pictures.Stored | None = None) -> Shown:
        """One target in pictures; without columns where none are stored."""
        target, stored = self.targets[index], stored or self._stored()
        client = target.get("client", index)
        scores = (
            ("original", "Original", wording.decibels(_mean(_beside(target, "original")))),
            ("truth", "Truth", ""),
            ("claim", "Attack", wording.decibels(self.target_psnr()[index])),
            ("control", "Control", wording.decibels(_mean(_beside(target, "control")))),
            ("baseline", "Guess", wording.decibels(_mean(_guess(target)))),
        )
        columns = []
        for key, title, score in scores:
            if key not in stored.images:
                continue
            picture = pictures.mosaic(stored.images[key][index])
            alt = self._alt(key, client, score)
            columns.append((title, score.removesuffix(" dB"), picture, alt))
        caption = f"client {client}" + (
            f", {target['status'].replace('_', ' ')}" if target["status"] in _BROKEN else ""
        )
        return Shown(role, caption, tuple(columns))

    def _alt(self, role: str, client: object, score: str) -> str:
        image = "Image" if self.batch == 1 else f"{self.batch} images"
        match role:
            case "original":
                return f"{image} of client {client} before its transformation, PSNR {score}"
            case "truth":
                return f"Truth: the private {image.lower()} of client {client}"
            case "claim":
                return f"Reconstruction by {self.attack} behind {self.spec}, PSNR {score}"
            case "control":
                return f"Control: {self.attack} on an unrelated client's update, PSNR {score}"
        return f"Guess: {image.lower()} chosen without any update, PSNR {score}"

    def rows(self, *, pictured: int) -> list[Row]:
        """The targets from the highest PSNR down; the first `pictured` with a strip."""
        psnr = self.target_psnr()
        order = sorted(range(len(psnr)), key=lambda i: (math.isnan(psnr[i]), -psnr[i], i))[:ROWS]
        stored = self._stored() if pictured else pictures.Stored({})
        rows = []
        for position, index in enumerate(order):
            target = self.targets[index]
            scores = target.get("scores") or {}
            strip = None
            if stored.images and position < pictured:
                strip = pictures.strip([images[index] for images in stored.images.values()])
            client = str(target.get("client", index))
            rows.append(
                Row(
                    cells=(
                        client,
                        _fate(target),
                        wording.number(psnr[index]),
                        wording.number(_mean(_beside(target, "control"))),
                        wording.number(_mean(_guess(target))),
                        wording.number(_mean(_floats(scores.get("ssim"))), 2),
                        _count(_floats(scores.get("identified"))),
                        wording.percent(_mean(_floats(scores.get("label_accuracy")))),
                        wording.significant(target.get("objective")),
                        wording.significant(target.get("objective_at_truth")),
                        target.get("message") or "",
                    ),
                    picture=strip,
                    alt=f"Client {client}: truth, attack, control and guess side by side",
                )
            )
        return rows

    def claims(self, *, pictured: int) -> list[Row]:
        """The targets in their order, where nothing is known but the claim."""
        images = self._stored().images.get("claim")
        return [
            Row(
                cells=(
                    str(target.get("client", index)),
                    target["status"].replace("_", " "),
                    wording.significant(target.get("objective")),
                    target.get("message") or "",
                ),
                picture=None
                if images is None or index >= pictured
                else pictures.mosaic(images[index]),
                alt=f"Claim by {self.attack} on client {target.get('client', index)}",
            )
            for index, target in enumerate(self.targets[:ROWS])
        ]

    @property
    def spread(self) -> list[tuple[str, str]]:
        """How PSNR is spread over images, and what an oracle's guess reaches, as (name, value)."""
        spread = dict(self.psnr.get("quantiles") or {})
        low, high = spread.pop("median_low", None), spread.pop("median_high", None)
        rows = [(name.replace("_", " "), wording.decibels(x)) for name, x in spread.items()]
        if low is not None and high is not None:
            between = f" ({wording.interval({'low': low, 'high': high})})"
            rows = [(name, text + between * (name == "median")) for name, text in rows]
        if self.psnr.get("nearest_public") is not None:
            oracle = wording.decibels(self.psnr["nearest_public"])
            rows.append(("nearest public image, chosen by an oracle", oracle))
        if self.psnr.get("original") is not None:
            against = wording.decibels(self.psnr["original"])
            rows.append(("against the image before its transformation", against))
        if self.psnr.get("ceiling") is not None:
            begun = wording.decibels(self.psnr["ceiling"])
            rows.append(("begun at the truth, an oracle's ceiling nearby", begun))
        return rows

    def _stored(self) -> pictures.Stored:
        places = [(t.get("tensors"), t.get("row", 0)) for t in self.targets]
        return pictures.load(self._directory, places)


@dataclass(frozen=True, slots=True)
class Protection:
    """One protection over all attacks and settings: its verdict rests on the strongest attack."""

    spec: str
    name: str
    fields: str
    verdict: str
    word: str
    reason: str
    strongest: Finding | None
    tested: str
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trend:
    """Leakage along one axis of the scenario, a panel per protection."""

    anchor: str
    topic: str
    title: str
    panels: list[tuple[Finding, Markup]]
    note: str = "Mean PSNR with intervals, by the strongest attack at each point."


class Report:
    """Everything the template asks for, in the order in which a reader meets it."""

    def __init__(self, result: Json, directory: Path) -> None:
        self.result = result
        self.findings = [Finding(raw, directory) for raw in result["findings"]]
        self.measured = [f for f in self.findings if f.measured]
        self.unmeasured = [f for f in self.findings if not f.measured]
        verdicts = verdict_by_defense(
            [
                {**f.raw, "defense_spec": f.spec, "verdict": f.raw.get("verdict") or "inconclusive"}
                for f in self.findings
            ]
        )
        self.protections = [
            _protection(group, verdicts[group[0].spec])
            for group in _grouped(self.findings, lambda f: f.spec)
        ]
        self.tradeoff = Tradeoff(
            self.measured,
            {p.spec: (p.verdict, p.word) for p in self.protections},
            costs.kept(directory),
        )
        self.strongest = [p.strongest for p in self.protections if p.strongest]
        self.undefended = next((f for f in self.strongest if f.raw["defense"] == "none"), None)
        self.settings_named = list(dict.fromkeys(f.setting for f in self.findings))
        self.galleries = [(f, *f.gallery()) for f in self.strongest]
        self.hero = self._hero()
        self.galleries_shown = GALLERIES
        self.proofs = proofs.lines(self.measured)
        self.proof_title = proofs.title(self.proofs)
        self.scatters = proofs.scatters(self.strongest)
        self.scatter_title = proofs.scatter_title(self.scatters)

    @property
    def headline(self) -> str:
        """The finding in one sentence: the first clause of what the result states."""
        return self._clauses[0]

    @property
    def rest(self) -> str:
        """The other clauses of the headline, as a sentence of their own."""
        clauses = self._clauses[1:]
        if not clauses:
            return ""
        more = len(clauses) - CLAUSES
        text = "; ".join(clauses[:CLAUSES]) + (f"; {more} more below" if more > 0 else "")
        return f"Behind protections: {text}."

    @property
    def _clauses(self) -> list[str]:
        if self.result.get("headline"):
            return str(self.result["headline"]).rstrip(".").split("; ")
        if not self.measured:
            return ["Nothing was measured"]
        worst = max(self.measured, key=_strength)
        return [f"The server recovers {worst.images} images ({worst.name.lower()})"]

    @property
    def lede(self) -> str:
        """What was done, for a reader who meets the tool for the first time."""
        settings = self.settings_named
        where = settings[0] if len(settings) == 1 else wording.plural(len(settings), "setting")
        if self.result.get("recorded"):
            return (
                f"gradleak attacked what a server recorded of real clients ({where or 'none'})"
                + (
                    ", and compared what its attacks reconstruct with the truth that the auditor "
                    "gave for scoring alone, with a guess and with a control."
                    if self.measured
                    else "; without the truth, the claims below are for the clients to judge."
                )
            )
        return (
            f"gradleak simulated clients with known private data ({where or 'none'}), showed the "
            "server only what a client sends, and compared what its attacks reconstruct with the "
            "truth, with a guess and with a control."
        )

    @property
    def facts(self) -> list[str]:
        """Size of the audit in a few short phrases."""
        run = max((f.trials.get("run", 0) for f in self.measured), default=0)
        attacks = len({f.raw["attack"] for f in self.findings})
        protections = sum(p.spec != "none" for p in self.protections)
        facts = [wording.plural(attacks, "attack"), wording.plural(protections, "protection")]
        if run:
            facts.append(f"{wording.plural(run, 'target')} per pair")
        pairs = wording.plural(len(self.findings), "pair")
        facts.append(f"{len(self.measured)} of {pairs} measured")
        facts.append(f"computed in {wording.seconds(self.result['seconds'])}")
        return facts

    def _hero(self) -> tuple[Finding, Shown] | None:
        """The median target without protection: what to expect, not the best picture."""
        if not self.galleries:
            return None
        first = max(self.galleries, key=lambda g: (g[0] is self.undefended, g[0].strength))
        finding, shown, _ = first
        return (finding, shown[min(1, len(shown) - 1)]) if shown else None

    @property
    def verdict_title(self) -> str:
        """The verdicts, counted."""
        compared = [p for p in self.protections if p.spec.partition(":")[0] != "none"]
        if not compared and self.protections:
            return f"Without protection: {self.protections[0].word.lower()}"
        return wording.verdict_title({v: sum(p.verdict == v for p in compared) for v in _ORDER})

    @property
    def pictures_title(self) -> str:
        """What the pictures show."""
        if not self.hero:
            return "No pictures were stored"
        finding, _ = self.hero
        psnr = sorted(v for v in finding.target_psnr() if not math.isnan(v))
        bare = finding.raw["defense"] == "none"
        where = "without protection" if bare else f"behind {finding.spec}"
        if not psnr:
            return f"No finite reconstruction {where}"
        median = psnr[(len(psnr) - 1) // 2]
        return (
            f"The worst target {where} comes back at {wording.decibels(psnr[-1])}, "
            f"the median one at {wording.decibels(median)}"
        )

    @property
    def table_title(self) -> str:
        """What the table shows."""
        leaking = sum(f.verdict == "leaks" for f in self.measured)
        verb = "leaks" if leaking == 1 else "leak"
        return (
            f"{leaking} of {wording.plural(len(self.measured), 'measured pair')} of attack and "
            f"protection {verb}"
        )

    @property
    def table(self) -> list[tuple[str, list[Finding]]]:
        """Rows by setting."""
        return [(group[0].setting, group) for group in _grouped(self.findings, lambda f: f.setting)]

    @property
    def risk_title(self) -> str:
        """Shares of images above 20 dB, undefended and behind the leakiest protection."""

        def share(finding: Finding) -> float:
            values = finding.image_psnr("scores")
            return sum(v > RECOVERED_PSNR_DB for v in values) / len(values) if values else 0.0

        parts = []
        if self.undefended and self.undefended.targets:
            parts.append(f"{wording.percent(share(self.undefended))} without protection")
        behind = [f for f in self.strongest if f.raw["defense"] != "none" and f.targets]
        if behind:
            worst = max(behind, key=share)
            some = f"{wording.percent(share(worst))} behind {worst.spec}"
            parts.append(some if share(worst) else "none behind a protection")
        return f"Images that come back above 20 dB: {wording.listing(parts)}"

    @property
    def curves(self) -> list[tuple[Finding, Markup]]:
        """A risk curve per protection, the undefended one for comparison."""
        out = []
        for finding in self.strongest:
            reference = None if finding is self.undefended else self.undefended
            curve = finding.curve(beside=reference)
            if curve:
                out.append((finding, curve))
        return out

    @property
    def violations(self) -> list[tuple[Finding, str]]:
        """Every proved limit that an attack breaks."""
        return [(f, text) for f in self.measured for text in f.raw.get("violations") or ()]

    @property
    def curves_hold(self) -> dict[str, bool]:
        """Which of the optional lines any risk curve has."""
        shown = [finding for finding, _ in self.curves]
        return {
            "undefended": len(shown) > 1,
            "begun": any(f.image_psnr("ceiling") for f in shown),
            "proved": any(f.proved_risk for f in shown),
        }

    @property
    def fate_title(self) -> str:
        """Who is to blame for the misses."""
        totals: dict[str, int] = {}
        for finding in self.strongest:
            for css, _, count in finding.fates:
                totals[css] = totals.get(css, 0) + count
        missed = sum(count for css, count in totals.items() if css != "recovered")
        if not missed:
            return "The strongest attack missed no target"
        blunt = missed - totals.get("information", 0)
        return (
            f"Of {wording.plural(missed, 'missed target')}, {blunt} say nothing about safety"
            if blunt
            else f"All {wording.plural(missed, 'missed target')} are information-limited"
        )

    @property
    def trends(self) -> list[Trend]:
        """Leakage along training stages and batch sizes, where there are several."""
        return [
            trend
            for key, topic, label in (
                ("stage", "training stage", "{}"),
                ("batch_size", "batch size", "batch {}"),
                ("honest_clients", "number of honest clients in a sum", "{}"),
            )
            if (trend := self._trend(key, topic, label)).panels
        ]

    def _trend(self, key: str, topic: str, label: str) -> Trend:
        def category(finding: Finding) -> object:
            return finding.raw["scenario"].get(key)

        panels, titles = [], []
        for group in _grouped(self.measured, lambda f: f.spec):
            best = [max(same, key=_strength) for same in _grouped(group, category)]
            best.sort(key=lambda f: _rank(category(f)))
            if len(best) < 2:
                continue
            points = [
                charts.Point(
                    label.format(category(f)),
                    *(f.psnr.get(k) for k in ("value", "low", "high", "control", "baseline")),
                )
                for f in best
            ]
            words = [f"{wording.decibels(point.value)} at {point.label}" for point in points]
            titles.append(f"{best[0].name}: {wording.listing(words)}")
            panels.append((best[0], charts.trend(points, name=titles[-1])))
            if key == "honest_clients":
                panels.append((best[0], _identification(best, label, category)))
        known = Trend(key.replace("_", "-"), topic, titles[0] if titles else "", panels)
        return known if key != "honest_clients" else dataclasses.replace(known, note=SUMS)

    @property
    def threats(self) -> list[tuple[list[str], int]]:
        """Distinct threat models in plain words, with the number of findings under each."""
        groups = _grouped(
            [f for f in self.findings if f.raw.get("threat")], lambda f: repr(f.raw["threat"])
        )
        return [(wording.threat(group[0].raw["threat"]), len(group)) for group in groups]

    @property
    def threat_title(self) -> str:
        """Who attacks, in a few words."""
        threats = [f.raw["threat"] for f in self.findings if f.raw.get("threat")]
        malicious = any(t.get("server") == "malicious" for t in threats)
        alone = any(t.get("view", "client") == "client" for t in threats)
        server = "A malicious server" if malicious else "An honest but curious server"
        return f"{server} sees {'each update' if alone else 'only sums of updates'}"

    @property
    def sent(self) -> list[str]:
        """What the clients send, in plain words."""
        names = dict.fromkeys(str(f.raw["scenario"].get("mechanism", "")) for f in self.findings)
        return [f"{wording.MECHANISMS.get(n, 'its update')} ({n})" for n in names if n]

    @property
    def not_tested(self) -> list[tuple[str, str]]:
        """What the numbers do not cover, as (what, why)."""
        gaps = [(str(text), "") for text in self.result.get("not_tested", ())]
        alone = twins.unaware_only([f.raw for f in self.measured])
        unaware = sorted({str(raw.get("defense_spec") or raw["defense"]) for raw in alone})
        if unaware:
            gaps.append(
                (
                    f"Attackers who know the protection, for {wording.listing(unaware)}",
                    "these attacks were unaware of it, and an aware one may do better",
                )
            )
        return gaps

    @property
    def gates(self) -> list[dict[str, object]]:
        """The --fail-on conditions: "condition", "holds" and "outcome" in words."""
        out = []
        for item in self.result.get("fail_on") or ():
            gate = item if isinstance(item, Mapping) else {"condition": item}
            holds = gate.get("holds")
            hit = wording.plural(len(gate.get("findings") or ()), "finding")
            outcome = f"holds for {hit}" if holds else "does not hold"
            out.append(
                {
                    "condition": str(gate.get("condition", "")),
                    "holds": bool(holds),
                    "outcome": "was to be checked" if holds is None else outcome,
                }
            )
        return out

    @property
    def command(self) -> str:
        """The command that repeats this audit."""
        return str(self.result.get("command") or "")

    number = staticmethod(wording.number)
    percent = staticmethod(wording.percent)

    @staticmethod
    def two(value: object) -> str:
        """Write a number with two decimals."""
        return wording.number(value, 2)

    @staticmethod
    def whole(value: object) -> str:
        """Write a count with separated thousands."""
        grouped = isinstance(value, int) and f"{value:,}".replace(",", "\u202f")
        return grouped or wording.number(value, 0)

    @property
    def settings(self) -> list[tuple[str, str, str]]:
        """Settings as (name, value, "given" or "default" or "")."""
        return _settings(self.result["settings"])

    @property
    def environment(self) -> list[tuple[str, str]]:
        """The machine and the versions."""
        return [(name, value) for name, value, _ in _settings(self.result["environment"])]

    @property
    def claims(self) -> list[tuple[Finding, list[Row]]]:
        """Claims that nothing was there to score with, by finding."""
        found = []
        left = STRIPS
        for finding in (f for f in self.findings if f.state == "unscored"):
            rows = finding.claims(pictured=left)
            left -= sum(row.picture is not None for row in rows)
            found.append((finding, rows))
        return found

    @property
    def details(self) -> Iterable[tuple[Finding, list[Row], bool]]:
        """Every measured finding with its targets, pictured until the page's budget is spent."""
        left = STRIPS
        for finding in self.measured:
            rows = finding.rows(pictured=left)
            left -= sum(row.picture is not None for row in rows)
            yield finding, rows, any(row.picture for row in rows)


def _identification(
    found: Sequence[Finding], label: str, category: Callable[[Finding], object]
) -> Markup:
    """The share of images identified along an axis."""
    points = [
        charts.Point(
            label.format(category(f)),
            *(m.get(k) for k in ("value", "low", "high", "control", "baseline")),
        )
        for f in found
        if (m := f.identified)
    ]
    words = [f"{wording.percent(point.value)} at {point.label}" for point in points]
    name = f"{found[0].name}: identified {wording.listing(words)}"
    return charts.trend(points, name=name, axis="identified (%)", top=1.0)


def _protection(group: Sequence[Finding], verdict: str) -> Protection:
    counted = {id(raw) for raw in twins.deciding([f.raw for f in group])}
    measured = [f for f in group if f.measured and id(f.raw) in counted]
    named = (group[0].spec, group[0].name, group[0].fields)
    if not measured:
        reasons = dict.fromkeys(f.raw.get("reason") or f.word.lower() for f in group)
        text = f"No attack could be measured: {'; '.join(reasons)}."
        return Protection(*named, "untested", wording.VERDICTS["untested"], text, None, "", ())
    behind = [f for f in measured if f.verdict == verdict]
    strongest = max(behind or measured, key=_strength)
    text = wording.reason(strongest.raw)
    failed = sum(f.state == "error" for f in group)
    if failed and verdict != "leaks":
        text += f" {wording.plural(failed, 'attack')} failed to run, so this protection stays open."
    attacks = wording.plural(len({f.raw["attack"] for f in measured}), "attack")
    settings = wording.plural(len({f.setting for f in measured}), "setting")
    return Protection(
        *named,
        verdict,
        wording.VERDICTS[verdict],
        text,
        strongest,
        f"{attacks} in {settings}",
        tuple(strongest.raw.get("warnings") or ()),
    )


def _strength(finding: Finding) -> tuple[bool, float, float, float]:
    return finding.strength


def _grouped(items: Iterable[_T], key: Callable[[_T], object]) -> list[list[_T]]:
    groups: dict[object, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _settings(raw: Json) -> list[tuple[str, str, str]]:
    """Flatten settings, whether stored flat or as {"given": ..., "defaulted": ...}."""
    origins = {"given": "given", "defaulted": "default"}
    if raw and set(raw) <= set(origins) and all(isinstance(v, Mapping) for v in raw.values()):
        return [
            (name, _text(value), origins[part])
            for part, values in raw.items()
            for name, value in values.items()
        ]
    return [(name, _text(value), "") for name, value in raw.items()]


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value) or "–"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    return str(value)


def _rank(category: object) -> tuple[float, str]:
    """Order of training stages and batch sizes along an axis."""
    named = {"init": 0.0, "early": 100.0, "trained": math.inf}
    text = str(category)
    try:
        return (named[text] if text in named else float(text.rpartition("-")[2]), text)
    except ValueError:
        return (math.inf, text)


def _floats(values: object) -> list[float]:
    if not isinstance(values, list):
        return []
    return [math.nan if v is None else float(v) for v in values]


def _beside(target: Json, source: str) -> list[float]:
    """PSNR of "control", "ceiling" or "original"; empty where there is none."""
    return _floats((target.get(source) or {}).get("psnr_db"))


def _guess(target: Json) -> list[float]:
    """PSNR of the best guess that needs no oracle: the one that the stored picture shows."""
    named = target.get("baselines") or {}
    for name in ("class_mean", "mean_image"):
        if name in named:
            return _floats(named[name].get("psnr_db"))
    return []


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _median(values: Sequence[float]) -> float:
    known = sorted(v for v in values if not math.isnan(v))
    return known[(len(known) - 1) // 2] if known else math.nan


def _finite(value: object) -> float:
    if not isinstance(value, (int, float)) or math.isnan(value):
        return -math.inf
    return float(value)


def _fate(target: Json) -> str:
    """What became of a target, in words."""
    if target.get("solved"):
        return "recovered"
    return str(target.get("missed") or target["status"]).replace("_", "-")


def _count(flags: Sequence[float]) -> str:
    if not flags:
        return "–"
    return f"{sum(flag > 0.5 for flag in flags)} of {len(flags)}"
