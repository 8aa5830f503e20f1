"""How close a claim is to the truth, and how sure one can be of it.

Scores know two batches and the public form of the data; they never see how a claim was made.
"""

from gradleak.metrics.align import MISSING, align, matched
from gradleak.metrics.baselines import baselines
from gradleak.metrics.identify import identified
from gradleak.metrics.image import METRICS, PSNR_CEILING_DB, Metric, mse, psnr_db, ssim
from gradleak.metrics.labels import label_accuracy
from gradleak.metrics.score import score
from gradleak.metrics.statistics import (
    Interval,
    clopper_pearson,
    clustered_mean,
    clustered_rate,
    excess_risk,
    excess_risk_interval,
    median_interval,
    paired_difference,
    sign_test,
    wilson,
)

__all__ = [
    "METRICS",
    "MISSING",
    "PSNR_CEILING_DB",
    "Interval",
    "Metric",
    "align",
    "baselines",
    "clopper_pearson",
    "clustered_mean",
    "clustered_rate",
    "excess_risk",
    "excess_risk_interval",
    "identified",
    "label_accuracy",
    "matched",
    "median_interval",
    "mse",
    "paired_difference",
    "psnr_db",
    "score",
    "sign_test",
    "ssim",
    "wilson",
]
