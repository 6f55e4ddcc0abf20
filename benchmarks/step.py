"""A training step against a plain one written down from the paper, and each of our choices undone, in turns.

    python benchmarks/step.py [--rounds 9] [--batch 32]     # CPU: ResNet-18, 2 x 96 + 4 x 48, fp32 and bf16
    python benchmarks/step.py --batch 256                   # on a GPU: ResNet-50, 2 x 224 + 6 x 96, bf16

The plain step is `reference_step.py`; both start from the same weights, and their first losses are compared. A step is
forward, backward, check, update, on views that are there already, in one process. Every round runs all variants once;
ratios are of the same round. Writes benchmarks/results/step.json and step.md (step_cuda on a GPU).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from reference_step import PlainLARS, ReferenceStep, plain_codes
from torch import Tensor

from largescale.config import Config, load_config
from largescale.data.views import Supports, Views
from largescale.methods import build_method
from largescale.models.backbones import stages
from largescale.optim.roles import parameter_groups
from largescale.parallel import precision
from largescale.parallel.engine import Engine, StepCheck
from largescale.parallel.freed_memory import keep_freed_memory
from largescale.parallel.strategies import build_engine
from largescale.plan.hardware import GPUS, gpu_like
from largescale.plan.simulate import simulate
from largescale.run.environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS = {
    "cpu": ["model.backbone=resnet18", "data.crops=[{num: 2, size: 96}, {num: 4, size: 48}]", "train.global_batch=32"],
    "cuda": [
        "model.backbone=resnet50",
        "data.crops=[{num: 2, size: 224}, {num: 6, size: 96}]",
        "train.global_batch=256",
    ],
}
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("bf16",)}

Step = Callable[[], float]

SINKHORN = "largescale.methods.swav.method.sinkhorn"
"""Where a step looks up the function of its codes."""


def views(config: Config, device: torch.device) -> Views:
    """Random views of a batch, channels last, in the precision in which the stream delivers them."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(group.num * config.train.global_batch, 3, group.size, group.size) for group in config.data.crops]
    images = [
        torch.randn(shape, generator=generator, device=device).to(
            precision.views_dtype(config), memory_format=torch.channels_last
        )
        for shape in shapes
    ]
    found = Views.numbered(images, config.train.global_batch, config.method.facts, config.method.sounds())
    if (support := config.method.supports()) is None:
        return found
    side = config.data.crops[0].size
    shown = torch.randn(support.views * support.size, 3, side, side, generator=generator, device=device)
    return found._replace(supports=Supports.numbered(support, shown.to(precision.views_dtype(config))))


def reference(config: Config, device: torch.device) -> Step:
    """The step of `ReferenceStep`, a training loop without this project's engine, on the same views."""
    torch.manual_seed(0)
    dtype = precision.AUTOCAST.get(config.train.precision, torch.float32)
    step = ReferenceStep(build_method(config).to(device), config, dtype)
    batch = [images.float().contiguous() for images in views(config, device).images]
    return lambda: step(batch)


def ours(
    config: Config,
    device: torch.device,
    change: Callable[[Engine, Config], None] | None = None,
    weights: torch.memory_format = torch.preserve_format,
) -> Step:
    """The step of the training loop, with something changed."""
    keep_freed_memory(device)  # of which the plain step has its share, in the same process
    torch.manual_seed(0)
    engine = build_engine(build_method(config).to(memory_format=weights), config, device)
    batch = views(config, device)
    if change is not None:
        change(engine, config)

    def step() -> float:
        check = engine.check(batch, engine.forward_backward(batch, 0).loss)
        engine.update(check, step=0, lr=config.optim.lr, clip=0.0)
        return check.loss

    return step


def in_nchw(engine: Engine, config: Config) -> None:
    """A change: views come in NCHW memory layout, not channels last."""
    batch = views(config, torch.device(engine.all_ranks.device_type))
    batch = batch._replace(images=[images.contiguous() for images in batch.images])
    engine.micro_batches = lambda _: [batch]


def by_view(engine: Engine, config: Config) -> None:
    """A forward pass for each view."""
    numbers = {group.size: group.num for group in config.data.crops}
    forward = engine.method.backbone.forward
    engine.method.backbone.forward = lambda group: torch.cat(
        [forward(view) for view in group.chunk(numbers[group.shape[-1]])]
    )


def by_parameter(engine: Engine, config: Config) -> None:
    """LARS one parameter after the other."""
    engine.optimizer = PlainLARS(parameter_groups(engine.method, engine.method.roles(), config.optim), config.optim)


def unchecked(engine: Engine, config: Config) -> None:
    """Nobody looks whether anything is finite, so the host does not wait for the device."""
    engine.check = lambda *_: StepCheck(0.0, 0.0, "")


def published_codes(scores: Tensor, *, epsilon: float, iterations: int, **_: object) -> Tensor:
    """Codes as the released code makes them, one view after the other, in place of `sinkhorn`."""
    return torch.stack([plain_codes(view, epsilon=epsilon, iterations=iterations) for view in scores])


def published_sinkhorn(config: Config, device: torch.device) -> Step:
    """Sinkhorn as the released code has it."""
    step = ours(config, device)

    def patched() -> float:
        with patch(SINKHORN, published_codes):
            return step()

    return patched


def convolved(config: Config, device: torch.device) -> Step:
    """Small maps through oneDNN too."""
    with patch("largescale.parallel.strategies.multiply_small_maps", lambda network: None):
        return ours(config, device)


def compiled(config: Config, device: torch.device) -> Step:
    """Residual blocks through torch.compile."""
    config.model.compile_stages = list(range(1, 1 + len(stages(build_method(config, on_meta=True).backbone))))
    return ours(config, device)


def weights_channels_last(config: Config, device: torch.device) -> Step:
    """Weights in the layout of the activations, which cuDNN would else bring them to in every pass."""
    return ours(config, device, weights=torch.channels_last)


VARIANTS: dict[str, Callable[[Config, torch.device], Step]] = {
    "plain": reference,
    "ours": ours,
    "ours, Sinkhorn as published": published_sinkhorn,
    "ours, LARS a parameter at a time": lambda config, device: ours(config, device, by_parameter),
    "ours, unchecked": lambda config, device: ours(config, device, unchecked),
    "ours, small maps convolved": convolved,
    "ours, a forward pass for each view": lambda config, device: ours(config, device, by_view),
    "ours, views in NCHW": lambda config, device: ours(config, device, in_nchw),
    "ours, weights channels last": weights_channels_last,
    "ours, blocks compiled": compiled,
}
"""What takes long to build, as cuDNN tries its algorithms on other shapes and layouts, comes last."""


ONLY_ON = {"ours, small maps convolved": "cpu", "ours, weights channels last": "cuda"}
"""Choices that are made on one kind of device alone."""


def variants(device: torch.device) -> dict[str, Callable[[Config, torch.device], Step]]:
    """What is measured on a device."""
    return {name: build for name, build in VARIANTS.items() if ONLY_ON.get(name, device.type) == device.type}


def measure(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of every variant in every round, by precision."""
    result: dict[str, Any] = {"seconds": {}, "losses": {}}
    for name in PRECISIONS[device.type]:
        config = configuration(SETTINGS[device.type], batch, name)
        precision.set_up(config, device)
        steps = {
            what: build(configuration(SETTINGS[device.type], batch, name), device)
            for what, build in variants(device).items()
        }
        result["losses"][name] = compare_losses({what: steps[what]() for what in ("plain", "ours")}, name)
        result["seconds"][name] = in_turns(steps, rounds, device)
        result["config"] = {
            "backbone": config.model.backbone,
            "batch": config.train.global_batch,
            "crops": [f"{group.num} x {group.size}" for group in config.data.crops],
        }
    return result


def compare_losses(losses: dict[str, float], name: str) -> dict[str, float]:
    """The first losses, which must be those of the plain step but for rounding.

    Raises:
        SystemExit: they are not, so there is nothing to compare.
    """
    bound = (1e-4 if name == "fp32" else 1e-2) * losses["plain"]
    if any(abs(loss - losses["plain"]) > bound for loss in losses.values()):
        raise SystemExit(f"the steps do not compute the same: losses {losses}")
    return losses


def in_turns(steps: dict[str, Step], rounds: int, device: torch.device, warm_up: int = 3) -> dict[str, list[float]]:
    """Seconds of each step; the first rounds compile and warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + warm_up):
        for name, step in steps.items():
            _synchronize(device)
            started = time.perf_counter()
            step()
            _synchronize(device)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def configuration(settings: list[str], batch: int, name: str) -> Config:
    """The recipe that is measured: settings, a batch (0 is theirs), a precision."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write("name: step\ndata: {shards: unset}\n")
        file.flush()
        size = [f"train.global_batch={batch}"] if batch else []
        return load_config(
            file.name,
            [
                *settings,
                *size,
                f"train.precision={name}",
                "optim.name=lars",
                "method.freeze_prototypes_steps=0",
                "parallel.strategy=ddp",
            ],
        )


def times_plain(seconds: dict[str, list[float]], what: str) -> float:
    """How many times as fast as the plain step: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(seconds["plain"], seconds[what], strict=True))


def table(result: dict[str, Any], flops: int, peak: float) -> str:
    """The results as Markdown."""
    names = list(result["seconds"])
    head = "".join(f" {name}, ms | times plain |" for name in names)
    lines = [f"| step |{head}", "|---|" + "---|---|" * len(names)]
    for what in result["seconds"][names[0]]:
        cells = ""
        for name in names:
            seconds = result["seconds"][name]
            ratio = times_plain(seconds, what)
            cells += f" {1000 * statistics.median(seconds[what]):.0f} | {ratio:.2f} |"
        lines.append(f"| {what} |{cells}")
    batch = result["config"]["batch"]
    for name in names:
        step = statistics.median(result["seconds"][name]["ours"])
        used = f", {flops / step / peak:.0%} of the data sheet's" if peak else ""
        lines += ["", f"Ours in {name}: {batch / step:,.1f} images/s, {flops / step / 1e12:.2f} TFLOP/s{used}."]
    return "\n".join(lines)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = simulate(configuration(SETTINGS[device.type], arguments.batch, PRECISIONS[device.type][0]), 1).flops
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, init_method=f"file://{folder}/store"
        )
        result = measure(device, arguments.batch, arguments.rounds)
        dist.destroy_process_group()
    machine = environment()
    machine.pop("command")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    like = gpu_like(gpu, torch.cuda.get_device_properties(0).total_memory / 1e9) if gpu else ""
    peak = 1e12 * GPUS[like].tflops if like else 0.0
    name, facts = "step_cuda" if gpu else "step", result["config"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    written = {**result, "flops": flops, "environment": machine}
    (RESULTS / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(
        "# A training step\n\n"
        f"`python benchmarks/step.py` on {time.strftime('%Y-%m-%d')}: {gpu or machine['processor']}, "
        f"{machine['cpu_cores']} cores, torch {machine['torch']}; {facts['backbone']}, batch {facts['batch']}, "
        f"{' + '.join(facts['crops'])} px; medians of {arguments.rounds} rounds in turns, ratios of the same round. "
        "Higher ratios are faster. bf16 of the plain step is autocast.\n\n" + table(result, flops, peak) + "\n"
    )


if __name__ == "__main__":
    main()
