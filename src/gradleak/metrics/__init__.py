"""How close a claim is to the truth, how sure one can be of it, and how close any claim can be.

Scores know two batches and the public form of the data; they never see how a claim was made.
"""

from gradleak.metrics.align import MISSING, align, matched
from gradleak.metrics.baselines import baselines
from gradleak.metrics.bounds import (
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
from gradleak.metrics.distributed_privacy import distributed_epsilon
from gradleak.metrics.embeddings import classifier, features, fisherfaces
from gradleak.metrics.frechet import frechet_distance
from gradleak.metrics.guessing import best_guess
from gradleak.metrics.identify import SAME, identified
from gradleak.metrics.image import METRICS, PSNR_CEILING_DB, Metric, mse, psnr_db, ssim
from gradleak.metrics.labels import label_accuracy
from gradleak.metrics.privacy import dp_ceiling, epsilon, epsilon_curve, gaussian_ceiling
from gradleak.metrics.score import score
from gradleak.metrics.statistics import (
    Interval,
    clopper_pearson,
    clustered_mean,
    clustered_rate,
    excess_risk,
    excess_risk_interval,
    mean_at_most,
    median_interval,
    paired_difference,
    sign_test,
    wilson,
)
from gradleak.metrics.users import (
    Classify,
    Embedding,
    UserRate,
    attribute_inference,
    gallery,
    majority,
    ranks,
    reidentification,
    similarity,
)

__all__ = [
    "METRICS",
    "MISSING",
    "PSNR_CEILING_DB",
    "SAME",
    "Classify",
    "Embedding",
    "Floor",
    "Interval",
    "Metric",
    "UserRate",
    "align",
    "attribute_inference",
    "baselines",
    "best_guess",
    "classifier",
    "clopper_pearson",
    "clustered_mean",
    "clustered_rate",
    "dfil",
    "dfil_probed",
    "distributed_epsilon",
    "dp_ceiling",
    "epsilon",
    "epsilon_curve",
    "excess_risk",
    "excess_risk_interval",
    "features",
    "fisherfaces",
    "frechet_distance",
    "gallery",
    "gaussian_ceiling",
    "gaussian_information",
    "identified",
    "influence",
    "influence_bound",
    "information_matrix",
    "jacobian",
    "label_accuracy",
    "laplace_information",
    "majority",
    "matched",
    "mean_at_most",
    "median_interval",
    "mse",
    "paired_difference",
    "posterior_trace",
    "psnr_db",
    "ranks",
    "recoverable_dimensions",
    "reidentification",
    "score",
    "sign_test",
    "similarity",
    "ssim",
    "update_map",
    "van_trees_floor",
    "wilson",
]
