"""Model inversion: weights of a trained classifier and public images → images per class.

No update of a client is seen, so none of these is an attack on gradients: they are not in
`ATTACKS` and audits do not run them. `gradleak reproduce diff-mi` does.
"""

from gradleak.attacks.inversion.classifier import Classifier, most_confident, top_k_margin
from gradleak.attacks.inversion.diff_mi import DiffMI, search_time
from gradleak.attacks.inversion.plain import LatentSearch, PixelAscent

__all__ = [
    "Classifier",
    "DiffMI",
    "LatentSearch",
    "PixelAscent",
    "most_confident",
    "search_time",
    "top_k_margin",
]
