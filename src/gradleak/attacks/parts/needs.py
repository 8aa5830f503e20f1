"""Whether an observation grants what an attack needs."""

from __future__ import annotations

from gradleak.defenses.wrapped import undefended
from gradleak.errors import NotApplicable
from gradleak.mechanisms import Diffusing, Draws
from gradleak.types import About, Fact, Observation


def require(about: About, seen: Observation) -> None:
    """Check modality, server behaviour, kind of network and granted facts.

    Raises:
        NotApplicable: says what is missing.
    """
    if seen.data.modality not in about.modalities:
        expected = ", ".join(sorted(about.modalities))
        raise NotApplicable(f"{about.id} attacks {expected}, the data are {seen.data.modality}")
    if about.server == "malicious" and seen.server != "malicious":
        raise NotApplicable(
            f"{about.id} needs a malicious server, the threat model has an honest one"
        )
    core = undefended(seen.mechanism)
    if about.classifiers and isinstance(core, Diffusing):
        raise NotApplicable(
            f"{about.id}: expected a classifier, the client's {core.id} trains a denoiser"
        )
    if about.needs & {Fact.TIMESTEPS, Fact.NOISE} and not isinstance(core, Diffusing):
        raise NotApplicable(
            f"{about.id} attacks clients that train a diffusion model, which this one is not known "
            "to do (--mechanism denoising)"
        )
    drawn = getattr(core, "draws", None) or Draws()
    fixed = getattr(core, "timestep", None) is not None
    granted = {
        Fact.BATCH_SIZE: seen.knowledge.batch_size is not None,
        Fact.LABELS: seen.knowledge.labels is not None,
        Fact.BN_STATISTICS: seen.knowledge.bn_statistics is not None,
        Fact.MINIBATCH_ORDER: getattr(core, "fixed_order", ()) is not None,
        Fact.PRIOR: seen.knowledge.prior is not None,
        Fact.TIMESTEPS: fixed or drawn.times is not None,
        Fact.NOISE: drawn.noise is not None,
    }
    missing = sorted(str(fact) for fact in about.needs if not granted.get(fact, True))
    if missing:
        raise NotApplicable(
            f"{about.id} needs {', '.join(missing)}: not granted (--knows {','.join(missing)})"
        )
