"""Learning-rate schedules as arrays: one value per step, so they resume by indexing and plot as they are."""

from __future__ import annotations

import numpy as np

from largescale.config import Config, OptimConfig


def cosine_with_warmup(*, peak: float, final: float, start: float, warmup_steps: int, num_steps: int) -> np.ndarray:
    """Linear from `start` to `peak` over the warm-up, then half a cosine from `peak` to `final`: float64 [num_steps].

    Source: SwAV's published recipe (arXiv 2006.09882, appendix A).
    """
    warmup_steps = min(warmup_steps, num_steps)
    warmup = np.linspace(start, peak, warmup_steps, endpoint=False)
    progress = np.arange(num_steps - warmup_steps) / max(1, num_steps - warmup_steps)
    return np.concatenate([warmup, final + 0.5 * (peak - final) * (1 + np.cos(np.pi * progress))])


def learning_rates(config: Config, *, num_steps: int, steps_per_epoch: int) -> np.ndarray:
    """The learning rate of every step of a run: float64 [num_steps]."""
    return cosine_with_warmup(
        peak=config.optim.lr,
        final=config.optim.final_lr,
        start=config.optim.warmup_lr,
        warmup_steps=warmup_steps(config.optim, steps_per_epoch),
        num_steps=num_steps,
    )


def warmup_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Steps in which the learning rate rises, as asked for; a run may be shorter."""
    return round(config.warmup_epochs * steps_per_epoch)
