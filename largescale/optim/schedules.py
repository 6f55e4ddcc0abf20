"""Learning-rate schedules as precomputed arrays: one value a step, so they resume by indexing and plot as they are."""

from __future__ import annotations

import numpy as np


def cosine_with_warmup(
    *, peak: float, final: float, start: float, warmup_steps: int, num_steps: int
) -> np.ndarray:
    """Linear from `start` to `peak` over the warm-up, then half a cosine from `peak` to `final`: float64 [num_steps].

    Source: SwAV's published recipe (arXiv 2006.09882, appendix A).
    """
    warmup_steps = min(warmup_steps, num_steps)
    warmup = np.linspace(start, peak, warmup_steps, endpoint=False)
    progress = np.arange(num_steps - warmup_steps) / max(1, num_steps - warmup_steps)
    return np.concatenate([warmup, final + 0.5 * (peak - final) * (1 + np.cos(np.pi * progress))])
