"""What `largescale plan` says of a step on this device against the step itself: memory, and time."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from gpu.facts import synchronize
from gpu.harness import LEFT_OUT, NEEDS_GPU, Context, Report
from gpu.machine import planned_gpu
from gpu.strategies import random_views, recipe

from largescale.config import Config
from largescale.data.views import Views
from largescale.methods import build_method
from largescale.parallel import precision
from largescale.parallel.engine import Engine
from largescale.parallel.strategies import build_engine
from largescale.plan.hardware import GPUS
from largescale.plan.planner import Request, plan
from largescale.plan.trace import StepTrace
from largescale.processes import process_group

_CROPS = "data.crops=[{num: 2, size: 224}, {num: 6, size: 96}]"
_HEAD = {"resnet50": "[2048]", "regnet_y_16gf": "[3024]", "regnet_y_128gf": "[7392]"}
_BATCHES = {"resnet50": (128, 256), "regnet_y_16gf": (48, 96), "regnet_y_128gf": (16, 32)}
_SMALL = {
    "resnet50": "model={backbone: resnet, block: bottleneck, depths: [2, 1, 1], width: 32}",
    "regnet_y_16gf": "model.backbone=regnet_y_400mf",
    "regnet_y_128gf": "model={backbone: resnet, depths: [1, 1, 1, 1], width: 32}",
}
_TABLE = "Peak memory and time of a step, planned and measured"


def compare(report: Report, context: Context, network: str) -> None:
    """One network at two batch sizes."""
    configs = [_configuration(context, network, batch) for batch in ((4, 8) if context.small else _BATCHES[network])]
    gpu = planned_gpu(context)
    kind = gpu or "h100"  # bytes are the same on any
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        plans = list(pool.map(_plan, configs, [kind] * len(configs)))
    with process_group() as device:
        for config, planned in zip(configs, plans, strict=True):
            what = f"{config.model.backbone}, batch {config.train.global_batch}" + (
                ", recomputed" if config.model.recompute_stages else ""
            )
            needed = planned["memory_gb"]["needed"]
            if device.type == "cuda" and needed > torch.cuda.mem_get_info()[0] / 1e9:
                report.row(what, LEFT_OUT, f"the plan needs {needed:.1f} GB, which are not free", table=_TABLE)
                continue
            measure = _on_gpu if device.type == "cuda" else _on_cpu
            measure(report, what, config, planned, device)
    if not gpu:
        report.row(f"{network}: planned time of a step", NEEDS_GPU, "of a kind that the planner knows", table=_TABLE)


def _configuration(context: Context, network: str, batch: int) -> Config:
    recompute = ["model.recompute_stages=[1,2,3,4]"] if network == "regnet_y_128gf" else []
    sizes = (
        [_SMALL[network], "data.crops=[{num: 2, size: 64}, {num: 1, size: 32}]", "train.precision=fp32"]
        if context.small
        else [f"model.backbone={network}", f"method.hidden={_HEAD[network]}", _CROPS, "train.precision=bf16"]
    )
    return recipe([*sizes, *recompute, f"train.global_batch={batch}", "optim.name=lars", "parallel.strategy=ddp"])


def _plan(config: Config, kind: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    # As on paper, and not in the half precision that old GPUs have.
    return plan(config, Request(gpus=1, gpu=kind), advise=False)


def _engine(config: Config, device: torch.device) -> tuple[Engine, Views]:
    precision.set_up(config, device)
    torch.manual_seed(0)
    with (  # a plan is of a GPU's step
        patch("largescale.parallel.strategies.multiply_small_maps", lambda network: None),
        patch("largescale.parallel.ddp.spares_buckets", lambda device: False),
    ):
        engine = build_engine(build_method(config), config, device)
    small = replace(config, train=replace(config.train, global_batch=1))
    batch = config.train.global_batch
    images = [
        view.repeat(batch, 1, 1, 1).contiguous(memory_format=torch.channels_last)
        for view in random_views(small, 0, device, precision.views_dtype(config)).images
    ]
    return engine, Views.numbered(images, batch, config.method.facts, config.method.sounds())


def _step(engine: Engine, views: Views) -> None:
    output = engine.forward_backward(views, 0)
    engine.update(engine.check(views, output.loss), step=0, lr=1e-3, clip=0.0)


def _seconds(engine: Engine, views: Views, device: torch.device, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        _step(engine, views)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _on_gpu(report: Report, what: str, config: Config, planned: dict[str, Any], device: torch.device) -> None:
    before = torch.cuda.memory_allocated(device)
    engine, views = _engine(config, device)
    _seconds(engine, views, device, 2)  # cuDNN tries its algorithms, and they take memory for it
    torch.cuda.reset_peak_memory_stats(device)
    seconds = _seconds(engine, views, device, 3)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    reserved = torch.cuda.memory_reserved(device) / 1e9
    expected, expected_s = planned["memory_gb"]["peak of a step"], planned["seconds"]["step"]
    report.row(
        what,
        table=_TABLE,
        planned_GB=expected,
        measured_GB=peak,
        memory_ratio=peak / expected,
        reserved_GB=reserved,
        planned_ms=1000 * expected_s,
        measured_ms=1000 * seconds,
        time_ratio=seconds / expected_s,
        images_per_s=config.train.global_batch / seconds,
        MFU=f"{planned['flops'] / seconds / GPUS[planned['gpu']].tflops / 1e12:.1%}",
    )
    del engine, views
    torch.cuda.empty_cache()


def _on_cpu(report: Report, what: str, config: Config, planned: dict[str, Any], device: torch.device) -> None:
    """Bytes of the tensors that a real step holds, which are what is planned; its time is reported alone."""
    engine, views = _engine(config, device)
    _step(engine, views)  # the optimizer's state is there from the second step on
    trace = StepTrace()
    trace.watch(
        iter(
            [
                *engine.method.parameters(),
                *engine.method.buffers(),
                *views.images,
                *(value for state in engine.optimizer.state.values() for value in state.values()),
            ]
        )
    )
    seconds = _seconds(engine, views, device, 1)
    with trace:
        _step(engine, views)
    expected, found = planned["memory_gb"]["peak of a step"], trace.lap() / 1e9
    flops = sum(operator.flops for operator in trace.operators)
    report.judge(
        what,
        0.9 <= found / expected <= 1.1 and flops == planned["flops"],
        "not what was planned",
        table=_TABLE,
        planned_GB=expected,
        measured_GB=found,
        memory_ratio=found / expected,
        planned_GFLOP=planned["flops"] / 1e9,
        measured_GFLOP=flops / 1e9,
        measured_ms=1000 * seconds,
    )
