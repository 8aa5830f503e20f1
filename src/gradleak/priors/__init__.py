"""What an attacker believes of private data before he sees an update, from public data only.

prior = priors.fit("gaussian:shrinkage=0.1", public, spec, seed=0)
prior.log_prob(inputs, labels)

Networks are trained beforehand, by `gradleak prior train`, and given as a file or by the name of
one that comes with the package.
"""

from pathlib import Path

from gradleak import registry
from gradleak.errors import InvalidInput
from gradleak.priors.autoencoder import Autoencoder, Manifold
from gradleak.priors.box import Box
from gradleak.priors.components import Gaussians
from gradleak.priors.diffusion import Denoiser, Diffusion
from gradleak.priors.family import Family, Fitted
from gradleak.priors.files import digest, read, save
from gradleak.priors.gan import Gan, Generator
from gradleak.priors.gaussian import Gaussian
from gradleak.priors.mixture import Mixture
from gradleak.priors.network import Network, Trainable, train
from gradleak.priors.pca import Pca
from gradleak.priors.tv import TotalVariation
from gradleak.types import Batch, DataSpec, Prior

PRIORS: dict[str, type[Family]] = {
    family.id: family
    for family in (Box, TotalVariation, Gaussian, Pca, Mixture, Autoencoder, Gan, Diffusion)
}

TRAINED: dict[str, Path] = {
    path.stem: path for path in sorted(Path(__file__).with_name("trained").glob("*.safetensors"))
}
"""Trained priors that come with the package, each with a card and a sheet of samples beside it."""


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
    return build(spec).fit(prepared(public, data), data, seed=seed)


def prepared(public: Batch, data: DataSpec) -> Batch:
    """Public examples as families take them: checked, float64, on the CPU.

    Raises:
        InvalidInput: examples that do not fit the data.
    """
    inputs, classes = public.inputs.detach().cpu().double(), public.classes.cpu()
    if not len(public) or tuple(inputs.shape[1:]) != data.shape:
        raise InvalidInput(
            f"public examples {tuple(inputs.shape)}: expected at least one of shape {data.shape}"
        )
    if not bool(inputs.isfinite().all()):
        raise InvalidInput("public examples hold NaN or infinite values: expected finite ones")
    if not 0 <= int(classes.min()) <= int(classes.max()) < data.classes:
        raise InvalidInput(f"public labels: expected whole numbers from 0 to {data.classes - 1}")
    return Batch(inputs, classes)


def file_of(spec: str) -> Path | None:
    """The file that `spec` names: a name of `TRAINED` or a path; None for "id:field=value,..."."""
    if spec in TRAINED:
        return TRAINED[spec]
    path = Path(spec).expanduser()
    return path if path.suffix == ".safetensors" else None


def load(path: Path | str) -> Fitted:
    """Read a prior that `save` wrote.

    Raises:
        InvalidInput: no such file.
        CorruptFile: not a whole file of a prior.
    """
    return read(path, PRIORS)


__all__ = [
    "PRIORS",
    "TRAINED",
    "Autoencoder",
    "Box",
    "Denoiser",
    "Diffusion",
    "Family",
    "Fitted",
    "Gan",
    "Gaussian",
    "Gaussians",
    "Generator",
    "Manifold",
    "Mixture",
    "Network",
    "Pca",
    "Prior",
    "TotalVariation",
    "Trainable",
    "build",
    "digest",
    "file_of",
    "fit",
    "load",
    "prepared",
    "save",
    "train",
]
