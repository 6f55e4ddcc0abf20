"""What `largescale features` and `largescale assign` are asked for, and what of it cannot be done."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config import Config
from largescale.evaluate.feature_files import DTYPES, FORMS
from largescale.evaluate.weights import Published, Weights, exemplars_of
from largescale.methods import METHODS
from shards.ground.errors import InputError


@dataclass(frozen=True)
class Wish:
    """How features are to be written.

    Attributes:
        form: one of `feature_files.FORMS`.
        dtype: one of `feature_files.DTYPES`.
        assign: whether to add what the method's first head assigns each image to, and its score.
        whiten: power of its standard deviation that each component is divided by, from 0 to 1.
        assignments: whether to write what each head assigns each image to, and the runner-up, in place of features.
        thumbnails: side in pixels of a JPEG of each image, for viewers; 0 for none.
        dim: numbers per image, by principal components (`projection.py`); 0 leaves features as they are.
    """

    form: str = "parquet"
    dtype: str = "fp16"
    assign: bool = False
    thumbnails: int = 0
    dim: int = 0
    whiten: float = 0.0
    assignments: bool = False

    def check(self, config: Config, weights: Weights) -> None:
        """Refuse what cannot be done.

        Raises:
            InputError: says what, and what can.
        """
        if self.form not in FORMS:
            raise InputError(f"--format={self.form}: expected {' or '.join(FORMS)}")
        if self.dtype not in DTYPES:
            raise InputError(f"--dtype={self.dtype}: expected {' or '.join(DTYPES)}")
        if self.dim < 0:
            raise InputError(f"--dim={self.dim}: expected the numbers per image that are wanted, or 0 for all")
        if not 0 <= self.whiten <= 1:
            raise InputError(f"--whiten={self.whiten:g}: expected 0 (not at all) to 1 (equal variances)")
        if self.whiten and not self.dim:
            raise InputError(f"--whiten={self.whiten:g}: is about principal components; give their number by --dim")
        if (self.assign or self.assignments) and exemplars_of(config, weights) is None:
            what, remedy = ("", "use `largescale features`") if self.assignments else ("--assign: ", "leave it out")
            if isinstance(weights, Published):
                raise InputError(f"{what}{weights.path} is read without its heads; {remedy}")
            those = ", ".join(name for name, method in METHODS.items() if method.exemplars is not None)
            raise InputError(
                f"{what}method.name={config.method.name} has no lasting clusters to assign images to; use a run of "
                f"{those}, or {remedy}"
            )
        if not 0 <= self.thumbnails <= config.evaluate.size:
            raise InputError(f"--thumbnails={self.thumbnails}: expected 0 to evaluate.size={config.evaluate.size}")
