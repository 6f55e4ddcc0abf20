"""What the numbers of a clustering method mean, and warnings for those that look like collapse."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from largescale.config import Config
from largescale.methods.method import Row, Symptom
from largescale.methods.milestone import LATEST
from largescale.methods.swav.assignment import prior
from largescale.methods.swav.settings import Settings
from largescale.methods.swav.suited import QUEUE_WAITS, queue_size, wants_queue

_UNIFORM_LOSS = (0.99, 1.01)
"""Loss over ln K of uniform predictions. A higher loss means predictions that are sure and wrong, as in a network that
has just started."""

_UNIFORM_CODES = 0.98
_USED_OF_REACHABLE = 0.1
_UNBALANCED = 0.85

_SHARPEST = 0.01
"""An epsilon below which assignments are all but hard: a smaller one changes nothing."""
_USUAL_EPSILON, _USUAL_TEMPERATURE = 0.05, 0.1
_WARM = 0.5
"""Temperature above which scores, which are cosines, can hardly leave uniform predictions."""
_FEWEST = 20
_LONG_FREEZE = 0.1
"""Share of a run for which prototypes stay fixed that is long enough."""


def uniform_loss(counts: Sequence[int]) -> float:
    """The loss of uniform predictions, ln K, as a mean over heads."""
    return sum(math.log(count) for count in counts) / len(counts)


def reachable_usage(counts: Sequence[int], num_images: int, power: float = 0.0) -> float:
    """Share of the prototypes expected to be nearest to any of `num_images` images if all are as likely as they should.

    Of n draws from K equally likely ones, K (1 - (1 - 1/K)^n) distinct ones are expected (the classical occupancy
    problem; Feller, An Introduction to Probability Theory, vol. 1, section IV.2). The views of an image are not
    separate draws: they are meant to be nearest to the same prototype.

    Args:
        counts: prototypes of each head.
        num_images: different images that were looked at.
        power: of the law by which prototypes share the images, `method.prior_power`.
    """

    def reached(count: int) -> float:
        shares = prior(count, power)
        if shares is None:
            return count * (1 - (1 - 1 / count) ** num_images)
        return float((1 - (1 - shares) ** num_images).sum())

    return sum(reached(count) for count in counts) / sum(counts)


def balance(mean_codes: Sequence[Tensor], entropy: float, num_images: int, power: float = 0.0) -> float:
    """Entropy of the mean code of a batch, as a share of what so many images can reach, averaged over heads: 1 if all
    prototypes get their share of the images.

    Sinkhorn-Knopp sees to that, so less says that the queue, which takes part in it, differs from the batch.

    Args:
        mean_codes: of each head, [K].
        entropy: the mean entropy of a code over ln K.
        num_images: that were looked at.
        power: of the law by which prototypes share the images, `method.prior_power`.
    """
    shares = []
    for code in mean_codes:
        most, wanted = math.log(len(code)), prior(len(code), power)
        wanted_entropy = most if wanted is None else float(torch.special.entr(wanted).sum())
        reachable = min(wanted_entropy, math.log(max(2, num_images)) + entropy * most)
        shares.append(float(torch.special.entr(code).sum()) / reachable)
    return sum(shares) / len(shares)


def symptoms(config: Config, settings: Settings, low_rank: Symptom) -> list[Symptom]:
    """How codes and predictions look that go wrong.

    Args:
        config: of the run.
        settings: the method's part of it.
        low_rank: the symptom of embeddings on a line, by which few prototypes are reached.
    """
    return [*_of_codes(config, settings), *_of_predictions(config, settings), low_rank, _few(config, settings)]


def _of_codes(config: Config, settings: Settings) -> list[Symptom]:
    batch = config.train.global_batch
    shorter = f"method.queue={settings.queue // batch // 4 * batch}"  # a quarter, in whole batches; or none
    slower = f"optim.lr={config.optim.lr / 2:.2g}"
    return [
        Symptom(
            "uniform codes",
            sign=lambda row: row.get("assignment_entropy"),
            sick=(_UNIFORM_CODES, math.inf),
            recovery="down",
            seen=lambda row: f"assignments are nearly uniform (entropy {row['assignment_entropy']:.1%} of ln K)",
            meaning="samples are not told apart",
            remedy=_try(_sharper(settings) + _fewer(settings) or [slower]),
        ),
        Symptom(
            "queue harmful",
            sign=lambda row: row.get("code_balance") if settings.queue else None,
            sick=(0, _UNBALANCED),
            recovery="up",
            seen=lambda row: (
                f"the batch is assigned to some prototypes only (entropy of the mean code {row['code_balance']:.0%}) "
                "and the queue to the others"
            ),
            meaning="the queue's embeddings are too old to be compared with those of the batch",
            remedy=lambda row: _try([shorter, *_later_queue(settings, batch, row), slower]),
        ),
    ]


def _of_predictions(config: Config, settings: Settings) -> list[Symptom]:
    def over_ln_k(row: Row) -> float | None:
        return row.get("loss_over_ln_k")

    def seen(row: Row) -> str:
        return f"the loss is {row['loss_over_ln_k']:.1%} of ln K"

    def too_early(row: Row) -> bool:
        return _frozen(settings, row)

    rate, cooler = config.optim.lr, []
    if settings.temperature > _WARM:
        cooler = [f"method.temperature={_USUAL_TEMPERATURE}"]
    return [
        Symptom(
            "learning rate too high",
            sign=over_ln_k,
            sick=(_UNIFORM_LOSS[1], math.inf),
            recovery="down",
            seen=lambda row: f"{seen(row)}, above that of uniform predictions",
            meaning="predictions are sure and wrong, and were less so before",
            remedy=_try([f"optim.lr={rate / 10:.2g}", "a longer optim.warmup_epochs"]),
            than_before=True,
            too_early=too_early,
        ),
        Symptom(
            "learns too slowly",
            sign=over_ln_k,
            sick=(_UNIFORM_LOSS[1], math.inf),
            recovery="down",
            seen=lambda row: f"{seen(row)}, still above that of uniform predictions",
            meaning="predictions are sure and wrong, as in a network that has just started",
            remedy=_try([f"optim.lr={rate * 10:.2g}", "a shorter optim.warmup_epochs", "more train.epochs"]),
            too_early=too_early,
        ),
        Symptom(
            "stuck at ln K",
            sign=over_ln_k,
            sick=_UNIFORM_LOSS,
            recovery="down",
            seen=lambda row: f"{seen(row)}, as if predictions were uniform",
            remedy=lambda row: _try(
                [*cooler, *_sharper(settings), *_longer_freeze(settings, row), f"optim.lr={rate / 2:.2g}"]
            ),
            too_early=too_early,
        ),
    ]


def _few(config: Config, settings: Settings) -> Symptom:
    return Symptom(
        "few prototypes",
        sign=_used_of_reachable,
        sick=(0, _USED_OF_REACHABLE),
        recovery="up",
        seen=lambda row: (
            f"only {row['prototype_usage']:.2%} of the prototypes are nearest to any sample, where this many images "
            f"could reach {row['prototype_usage_reachable']:.1%}"
        ),
        meaning="embeddings gather in few places",
        remedy=lambda row: _try(
            [*_fewer(settings), *_longer_freeze(settings, row), *_queue(config, settings, row)]
            or [f"optim.lr={config.optim.lr / 2:.2g}"]
        ),
        too_early=lambda row: _frozen(settings, row),
    )


# What can still be changed, starting from the run's settings.


def _sharper(settings: Settings) -> list[str]:
    epsilon = min(0.6 * settings.epsilon, _USUAL_EPSILON)
    return [f"method.epsilon={epsilon:.2g}"] if settings.epsilon > _SHARPEST else []


def _fewer(settings: Settings) -> list[str]:
    if max(settings.counts) < _FEWEST:
        return []
    halves = [count // 2 if count >= _FEWEST else count for count in settings.counts]
    several = isinstance(settings.prototypes, list)
    return [f"method.prototypes={json.dumps(halves, separators=(',', ':')) if several else halves[0]}"]


def _longer_freeze(settings: Settings, row: Row) -> list[str]:
    share = settings.freeze_prototypes_steps / _num_steps(row)
    return ["a longer method.freeze_prototypes_steps"] if share < _LONG_FREEZE else []


def _later_queue(settings: Settings, batch: int, row: Row) -> list[str]:
    """Nothing, where it would take part so late that a start of the run would warn of it."""
    steps = settings.queue // batch
    later = 2 * settings.queue_start_step + steps
    return [f"method.queue_start_step={later}"] if later + steps <= LATEST * _num_steps(row) else []


def _queue(config: Config, settings: Settings, row: Row) -> list[str]:
    """Where `init` would propose one too, and the batch alone has fewer samples than there are prototypes."""
    batch, steps = config.train.global_batch, _num_steps(row)
    images = batch * (row["step"] + 1) / row["epoch"] if row.get("epoch") and "step" in row else math.inf
    micro_batch = batch // config.train.accumulate
    if settings.queue or batch >= max(settings.counts) or not wants_queue(micro_batch, images):
        return []
    start = f" with method.queue_start_step={int(QUEUE_WAITS * steps)}" if steps < math.inf else ""
    return [f"method.queue={queue_size(micro_batch, batch)}{start}"]


def _frozen(settings: Settings, row: Row) -> bool:
    """Whether prototypes are fixed and will not always be; where they are to the end, there is nothing to wait for."""
    return bool(row.get("step", math.inf) < settings.freeze_prototypes_steps < _num_steps(row))


def _num_steps(row: Row) -> float:
    """Steps of the whole run, by one of its lines."""
    known = "step" in row and row.get("progress", 0) > 0
    return round((row["step"] + 1) / row["progress"]) if known else math.inf


def _used_of_reachable(row: Row) -> float | None:
    reachable = row.get("prototype_usage_reachable", 0.0)
    return row.get("prototype_usage", 1.0) / reachable if reachable > 0 else None


def _try(remedies: list[str]) -> str:
    *first, last = remedies
    return f"Try, in another run.dir, {', '.join(first)}{' or ' if first else ''}{last}"
