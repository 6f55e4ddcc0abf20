"""A classifier that starts from logistic regression on what the frozen network makes of its images.

Fine-tuning from there moves the trunk only where it helps the classes, while a classifier that knows nothing sends its
first, large gradients through the trunk and spoils features that few labels cannot mend (Kumar et al.,
arXiv 2202.10054, LP-FT).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from largescale.config import Config
from largescale.data.corpora import Corpus
from largescale.evaluate.extract import Network, extract, on_every_rank
from largescale.evaluate.logistic import fit

STRENGTH = 1.0
"""Of the L2 penalty, on the mean loss: a strong one. Few images do not tell which is best, and where a weak one was
chosen on some of them, large weights sent large gradients through the trunk after all
(benchmarks/results/few_labels.md).
"""

_MAX_STEPS = 200


def start_from_logistic(
    head: nn.Linear, features_of: Network, corpus: Corpus, ids: np.ndarray, config: Config, device: torch.device
) -> None:
    """Set a classifier to logistic regression on centre crops of some images.

    Args:
        head: the classifier, of features [B, D].
        features_of: from normalised images to these, in evaluation mode.
        corpus: labelled images.
        ids: of those to use, int64; at least two with a label.
        config: of centre crops.
        device: of the network.

    Raises:
        InputError: no image can be used, or features are not finite.

    Collectives: every rank must call it; those of `extract`, `on_every_rank` and `fit`.
    """
    found = extract(corpus, config, {"to be fine-tuned": features_of}, device, ids=ids)
    known = on_every_rank(found)["to be fine-tuned"]
    fitted = fit(known.features, known.labels, len(known.classes), [STRENGTH], max_steps=_MAX_STEPS)
    own, standard = fitted.weights[0].cpu(), fitted.standardiser
    matrix = standard.scale[:, None] * (standard.axes @ own[:-1])
    with torch.no_grad():
        head.weight.copy_(matrix.T)
        head.bias.copy_(own[-1] - standard.mean @ matrix)
