"""What every method in METHODS has to pass: the same steps whatever holds its parameters and however many ranks.

A method is known here by `tests/methods/mini/NAME.yaml`, a recipe of milliseconds. Every rank gets other images, the
same ones in all for any number of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.checkpoint import sharded
from largescale.checkpoint.saver import Saver
from largescale.config import Config, load_config
from largescale.config.value_types import types_of
from largescale.data.length import Length
from largescale.data.order import rank_places
from largescale.data.views import Supports, Views
from largescale.distributed.collectives import sum_over_ranks
from largescale.methods import METHODS, Method, build_method
from largescale.methods.phase import PlainEmbeddings, no_embeddings, own_ids
from largescale.methods.taught import taught_by
from largescale.parallel.engine import Engine
from largescale.parallel.objectives import as_one
from largescale.parallel.precision import weights_dtype
from largescale.parallel.strategies import build_engine
from largescale.run.resume import load
from tests.helpers.teachers import teacher

RECIPES = Path(__file__).resolve().parent / "mini"
CPU = torch.device("cpu")
GLOBAL_BATCH = "train.loss_spans=global_batch"
STEPS = 4
LENGTH = Length(num_steps=STEPS, steps_per_epoch=2, num_samples=40, left_out=8)


def mini(method: str, *overrides: str) -> Config:
    """The recipe of a method; of one that learns from a teacher, from a small one."""
    taught = taught_by(teacher()) if "teacher" in types_of(METHODS[method].Settings) else []
    return load_config(RECIPES / f"{method}.yaml", [*taught, *overrides])


def views_of_step(config: Config, step: int, device: torch.device = CPU) -> Views:
    """This rank's views of random images; which images does not depend on the number of ranks."""
    generator = torch.Generator().manual_seed(step)
    batch = config.train.global_batch
    places = rank_places(
        batch, accumulate=config.train.accumulate, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    shapes = [(group.num, batch, 3, group.size, group.size) for group in config.data.crops]
    images = [
        torch.randn(shape, generator=generator, dtype=torch.float64)[:, places]
        .flatten(0, 1)
        .to(device, weights_dtype(config))
        for shape in shapes
    ]
    times = torch.rand(len(images[0]) // len(places), batch, generator=generator, dtype=torch.float64)[:, places]
    facts = {"times_us": (1e7 * times).long().to(device)} if "times_us" in config.method.facts else {}
    ids = (places - (places % 8 == 7) + 5 * step) % LENGTH.num_samples  # some come twice, as what stands in for others
    sounds = sounds_of_step(config, step, places, device)
    return Views(images, torch.from_numpy(ids).to(device), facts, supports_of_step(config, step, device), sounds=sounds)


def sounds_of_step(config: Config, step: int, places: np.ndarray, device: torch.device = CPU) -> Tensor | None:
    """Random sounds of the samples at these places."""
    if (wanted := config.method.sounds()) is None:
        return None
    generator = torch.Generator().manual_seed(2000 + step)
    sounds = torch.randn(config.train.global_batch, wanted.num_samples, generator=generator, dtype=torch.float64)
    return (3000 * sounds[places]).to(device, torch.int16)


def supports_of_step(config: Config, step: int, device: torch.device = CPU) -> Supports | None:
    """This rank's supports, of random images; some views are of one image."""
    if (wanted := config.method.supports()) is None:
        return None
    generator = torch.Generator().manual_seed(1000 + step)
    places = rank_places(
        wanted.size, accumulate=config.train.accumulate, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    side = config.data.crops[0].size
    images = torch.randn(wanted.views, wanted.size, 3, side, side, generator=generator, dtype=torch.float64)
    labels = torch.from_numpy(places % wanted.classes)
    ids = torch.from_numpy(places // wanted.classes // 3 * wanted.classes) + labels
    shown = images[:, places].flatten(0, 1).to(device, weights_dtype(config))
    return Supports(shown, labels.to(device), ids.to(device))


def whole_corpus(engine: Engine, step: int, device: torch.device = CPU) -> PlainEmbeddings:
    """What the network makes of random images, one of which cannot be read."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(LENGTH.num_samples, 3, 24, 24, generator=generator, dtype=torch.float64)
    images = images.to(device)
    ids = own_ids(LENGTH.num_samples)
    readable = torch.arange(ids.start, ids.stop, device=device) != 17
    rows = engine.embed(images[ids.start : ids.stop], step)[readable]
    sums = engine.method.phase_sums(step)
    return PlainEmbeddings(rows.sum(0, keepdim=True, dtype=torch.float64) if sums else rows, readable)


def spans_global_batch(method: str) -> bool:
    """Whether the loss of a method may span the global batch."""
    return "global_batch" in METHODS[method].Settings.loss_spans


def whole(value: Tensor) -> Tensor:
    """All of a tensor that ranks may hold in pieces. Collectives: its own."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def together(method: Method, signs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Signs of a step as the meter combines them. Collectives: one all-reduce."""
    sums = sum_over_ranks({name: value.double() for name, value in signs.items()})
    means = {name for name, sign in method.signs.items() if sign.over == "mean"}
    return {name: value / dist.get_world_size() if name in means else value > 0 for name, value in sums.items()}


def train(
    config: Config,
    steps: int = STEPS,
    *,
    still: bool = False,
    first: int = 0,
    checkpoints: Path | None = None,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Losses, gradient norms, signs and, on rank 0, the whole state in the end.

    Args:
        config: of the run.
        steps: where it ends.
        still: keep BatchNorm in evaluation mode.
        first: step to begin with; later ones than 0 go on from a checkpoint.
        checkpoints: folder of that one, and of the one that is saved in the end.
        device: of this rank.
    """
    torch.manual_seed(config.run.seed)
    engine = build_engine(build_method(config, LENGTH), config, device)
    for norm in engine.method.modules():
        if isinstance(norm, _BatchNorm):
            norm.train(norm.training and not still)
    if first:
        checkpoint = sharded.agree_on_latest(checkpoints, device)
        assert checkpoint is not None and checkpoint.step == first
        load(checkpoint, engine)
    losses, norms, signs = [], [], []
    for step in range(first, steps):
        if engine.method.phase_due(step):
            corpus = whole_corpus(engine, step, device) if engine.method.phase_embeds(step) else no_embeddings()
            engine.method.phase(step, corpus, lambda what: None)
        views, results = views_of_step(config, step, device), {}
        for objective in engine.method.objectives_of(step):
            output = engine.forward_backward(views, step, objective)
            check = engine.check(views, output.loss)
            assert not check.trouble
            engine.update(check, step=step, lr=config.optim.lr, clip=config.optim.clip_grad_norm)
            results[objective] = output, check
        output, check = as_one(results)
        losses.append(check.loss)
        norms.append(check.grad_norm)
        signs.append(together(engine.method, output.signs))
    if checkpoints is not None:
        saved = engine.state()
        saver = Saver(checkpoints, keep=1, keep_every=0, background=False, device=device)
        saver.save(saved, {"step": steps}, until_update=engine.until_update(saved))
    state = {name: whole(value) for name, value in engine.state().items()}
    return {"losses": losses, "norms": norms, "signs": signs, "state": state if dist.get_rank() == 0 else {}}


def recipes(ways: list[list[str]]) -> list[dict[str, Config]]:
    """The recipe of every method under every list of overrides, read once and not by each rank.

    A loss that may not span the global batch spans micro-batches: to a mean over images that is the same.
    """

    def one(name: str, way: list[str]) -> Config:
        return mini(name, *(key for key in way if key != GLOBAL_BATCH or spans_global_batch(name)))

    return [{name: one(name, way) for name in METHODS} for way in ways]


def train_all(
    ways: list[dict[str, Config]], *, still: bool = False, folder: Path | None = None, **part: int
) -> list[dict[str, dict[str, Any]]]:
    """Train `recipes`; in a folder of its own each, where they are to be saved."""

    def one(config: Config, name: str, place: int) -> dict[str, Any]:
        return train(config, still=still, checkpoints=folder and folder / f"{name}-{place}", **part)

    return [{name: one(config, name, place) for name, config in way.items()} for place, way in enumerate(ways)]
