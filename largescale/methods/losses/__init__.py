"""Losses of joint-embedding methods as plain functions, of use without the rest; see `over_ranks` for several ranks."""

from largescale.methods.losses.cosine import cosine
from largescale.methods.losses.cross_correlation import cross_correlation
from largescale.methods.losses.info_nce import info_nce
from largescale.methods.losses.margin import contrastive_margin
from largescale.methods.losses.nt_xent import nt_xent
from largescale.methods.losses.swapped_prediction import swapped_prediction
from largescale.methods.losses.triplet import triplet
from largescale.methods.losses.variance_covariance import variance_covariance

__all__ = [
    "contrastive_margin",
    "cosine",
    "cross_correlation",
    "info_nce",
    "nt_xent",
    "swapped_prediction",
    "triplet",
    "variance_covariance",
]
