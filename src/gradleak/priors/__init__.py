"""What an attacker believes of private data before he sees an update, from public data only.

prior = priors.fit("gaussian:shrinkage=0.1", public, spec, seed=0)
prior.log_prob(inputs, labels)
"""

from pathlib import Path

from gradleak import registry
from gradleak.errors import InvalidInput
from gradleak.priors.box import Box
from gradleak.priors.components import Gaussians
from gradleak.priors.family import Family, Fitted
from gradleak.priors.files import digest, read, save
from gradleak.priors.gaussian import Gaussian
from gradleak.priors.mixture import Mixture
from gradleak.priors.pca import Pca
from gradleak.priors.tv import TotalVariation
from gradleak.types import Batch, DataSpec, Prior

PRIORS: dict[str, type[Family]] = {
    family.id: family for family in (Box, TotalVariation, Gaussian, Pca, Mixture)
}


def build(spec: str) -> Family:
    """Build the family that "id:field=value,..." names.

    Raises:
        InvalidInput: unknown family or field, or a value that makes no sense.
    """
    return registry.build("prior", spec, PRIORS)


def fit(spec: str, public: Batch, data: DataSpec, *, seed: int) -> Fitted:
    """Fit a prior to public examples, in float64 on the CPU.

    Args:
        spec: "id:field=value,...".
        public: examples that anybody may have; never a private one.
        data: form of the data.
        seed: fixes randomised solvers and starts.

    Raises:
        InvalidInput: an unknown family or field, or examples that do not fit the data.
    """
    family = build(spec)
    inputs, classes = public.inputs.detach().cpu().double(), public.classes.cpu()
    if not len(public) or tuple(inputs.shape[1:]) != data.shape:
        raise InvalidInput(
            f"public examples {tuple(inputs.shape)}: expected at least one of shape {data.shape}"
        )
    if not bool(inputs.isfinite().all()):
        raise InvalidInput("public examples hold NaN or infinite values: expected finite ones")
    if not 0 <= int(classes.min()) <= int(classes.max()) < data.classes:
        raise InvalidInput(f"public labels: expected whole numbers from 0 to {data.classes - 1}")
    return family.fit(Batch(inputs, classes), data, seed=seed)


def load(path: Path | str) -> Fitted:
    """Read a prior that `save` wrote.

    Raises:
        InvalidInput: no such file.
        CorruptFile: not a whole file of a prior.
    """
    return read(path, PRIORS)


__all__ = [
    "PRIORS",
    "Box",
    "Family",
    "Fitted",
    "Gaussian",
    "Gaussians",
    "Mixture",
    "Pca",
    "Prior",
    "TotalVariation",
    "build",
    "digest",
    "fit",
    "load",
    "save",
]
