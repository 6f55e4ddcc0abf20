"""Real runs of the training loop: a save while steps go on, resuming bit for bit, and running out of memory."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from gpu.harness import NEEDS_GPU, Context, Report
from gpu.strategies import calm, random_views, recipe
from PIL import Image

from largescale.checkpoint import sharded
from largescale.checkpoint.saver import Saver
from largescale.methods import build_method
from largescale.parallel import auto_precision, precision
from largescale.parallel.strategies import build_engine
from largescale.processes import process_group

ROOT = Path(__file__).resolve().parents[2]
_CPU_MEMORY = 6 * 2**30
"""Address space of the run that is to run out of it, where there is no GPU."""

_SMALL_SHARE = 8
"""One of so many bundled images is enough to see that the demo runs."""

_TINY = [
    "model={backbone: resnet, stem: 3x3s2, depths: [1, 1], width: 16}",
    "method={hidden: [64], prototypes: 50}",
    "data.crops=[{num: 2, size: 24}, {num: 1, size: 16}]",
    "optim.name=adamw",
    "optim.lr=0.001",
]
_RESNET = [
    "model.backbone=resnet50",
    "method={hidden: [512], prototypes: 300}",
    "data.crops=[{num: 2, size: 64}, {num: 2, size: 48}]",
    "optim.name=lars",
    "optim.lr=0.3",
]


def staging(report: Report, context: Context) -> None:
    """A save in the background, while two more steps change everything, equals the state at its step bit for bit."""
    with process_group() as device:
        for strategy in ("ddp", "fsdp"):
            config = recipe(
                [*(_TINY if context.small else _RESNET), "train.global_batch=16", f"parallel.strategy={strategy}"]
            )
            config = auto_precision.of_device(config, device)
            precision.set_up(config, device)
            torch.manual_seed(0)
            method = build_method(config)
            calm(method)
            engine = build_engine(method, config, device)
            folder = Path(context.folder) / f"staging-{strategy}"
            saver = Saver(folder, keep=1, keep_every=0, background=True, device=device)
            _steps(engine, config, device, 2)
            state = engine.state()
            before = {name: _copy(value) for name, value in state.items()}
            saver.save(state, {"step": 2, "skipped": 0}, until_update=engine.until_update(state))
            _steps(engine, config, device, 2, before_update=saver.wait_staged)
            saver.wait()
            moved = sum(not torch.equal(_copy(value), before[name]) for name, value in engine.state().items())
            loaded = {name: torch.empty_like(value) for name, value in before.items()}
            checkpoint = sharded.agree_on_latest(folder, device)
            sharded.load(checkpoint, loaded, no_dist=True)
            wrong = [name for name, value in before.items() if not torch.equal(loaded[name], value)]
            report.judge(
                f"{strategy}: saved while steps go on",
                not wrong and moved > 0,
                f"{', '.join(wrong[:3])} differ" if wrong else "nothing had moved",
                tensors=len(before),
                differ_from_the_state=len(wrong),
                moved_meanwhile=moved,
            )


def _copy(value: torch.Tensor) -> torch.Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().to("cpu", copy=True)


def _steps(engine: Any, config: Any, device: torch.device, number: int, before_update: Any = None) -> None:
    for step in range(number):
        views = random_views(config, step, device, precision.views_dtype(config))
        output = engine.forward_backward(views, step)
        check = engine.check(views, output.loss)
        if before_update is not None:
            before_update()
        engine.update(check, step=step, lr=config.optim.lr, clip=0.0)


def resume(report: Report, context: Context, name: str) -> None:
    """A run that is killed at half the steps and goes on, against one in peace, in deterministic mode."""
    if context.small and name == "ResNet-50":
        report.row(name, NEEDS_GPU, "the demo network stands for both")
        return
    shards = _shards(context, 96, side=40)
    runs = [Path(context.folder) / f"resume-{name}-{number}" for number in (0, 1)]
    options = [
        *(_RESNET if name == "ResNet-50" else _TINY),
        f"data.shards={shards}",
        "data.streams=4",
        "train.global_batch=16",
        "train.steps=6",
        "train.deterministic=true",
        "run.log_every=1",
        "checkpoint.every_steps=3",
        "checkpoint.keep=3",
    ]
    lines, seconds = [], []
    for run, stop_after in ((runs[0], 0), (runs[1], 3), (runs[1], 0)):
        started = time.monotonic()
        lines.append(pretrain(context, [*options, f"run.dir={run}"], stop_after=stop_after))
        seconds.append(f"{time.monotonic() - started:.0f}")
    failed = [line for line in lines[::2] if line.returncode]
    digests = [_digest(run / "checkpoints" / "step-00000006") if not failed else "" for run in runs]
    losses = [_losses(run) for run in runs]
    report.judge(
        f"{name}: killed after 3 of 6 steps, against one in peace",
        digests[0] == digests[1] != "" and losses[0] == losses[1],
        _said(failed[0]) if failed else "weights or losses differ",
        losses_equal=losses[0] == losses[1],
        checkpoints_equal=digests[0] == digests[1],
        seconds_of_the_runs=" / ".join(seconds),
    )


def demo(report: Report, context: Context) -> None:
    """What a newcomer runs: bundled images to shards, the demo's recipe on one rank, its evaluations."""
    folder = Path(context.folder)
    with zipfile.ZipFile(ROOT / "shards" / "sample" / "fashion-mnist.zip") as archive:
        names = archive.namelist()
        archive.extractall(folder, names[::_SMALL_SHARE] if context.small else names)
    shards = {part: folder / f"demo-{part}" for part in ("train", "test")}
    convert = ["--labels", "folder", "--shuffle", "0", "--samples-per-shard", "1000"]
    for part, out in shards.items():
        source = folder / "fashion-mnist" / part
        run_python(["-m", "shards", "convert", str(source), str(out), *convert], check=True)
    run, started = folder / "demo", time.monotonic()
    options = [f"data.shards={shards['train']}", f"data.eval_shards={shards['test']}", f"run.dir={run}"]
    short = ["train.epochs=1", "evaluate.linear_epochs=2"] if context.small else []
    recipe_path = str(ROOT / "configs" / "demo.yaml")
    run_python(["-m", "largescale", "pretrain", recipe_path, *options, *short], check=True, timeout_s=context.left_s())
    seconds = time.monotonic() - started
    for protocol in ("knn", "linear"):
        command = ["-m", "largescale", "evaluate", protocol, str(run)]
        run_python(command, check=True, timeout_s=max(5.0, context.left_s() - 3))
    results = json.loads((run / "eval" / "linear.json").read_text())["results"]
    neighbours = json.loads((run / "eval" / "knn.json").read_text())["results"]
    accuracies = {f"linear, {which}": f"{result['top1']:.2%}" for which, result in results.items()}
    report.judge(
        "Fashion-MNIST, SwAV, configs/demo.yaml",
        context.small or results["pretrained"]["top1"] > results["pixels"]["top1"] + 0.01,
        "not a point better than a linear probe of raw pixels",
        **accuracies,
        kNN=f"{neighbours['pretrained']['top1']:.2%}",
        seconds_of_training=seconds,
    )


def _losses(run: Path) -> list[float]:
    path = run / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.exists() else []


def _digest(folder: Path) -> str:
    """Of the tensors of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() if files else ""


def _shards(context: Context, count: int, side: int) -> Path:
    """Images of noise as shards, made by the command."""
    images, shards = Path(context.folder) / f"images-{side}", Path(context.folder) / f"shards-{side}"
    if not shards.exists():
        images.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        for number in range(count):
            pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(images / f"{number:04d}.png")
        run_python(
            ["-m", "shards", "convert", str(images), str(shards), "--shuffle", "0", "--workers", "1"], check=True
        )
    return shards


def pretrain(
    context: Context, options: list[str], *, stop_after: int = 0, address_space: int = 0
) -> subprocess.CompletedProcess[str]:
    """`largescale pretrain` as a user gives it; `stop_after` kills it when it has saved that step."""
    recipe_path = Path(context.folder) / "recipe.yaml"
    recipe_path.write_text("name: check\ndata: {workers: 1}\n")
    command = ["-m", "largescale", "pretrain", str(recipe_path), *options]
    if stop_after:
        command = ["-c", _KILLED, str(stop_after), *command[2:]]
    return run_python(command, timeout_s=max(5.0, context.left_s() - 3), address_space=address_space)


_KILLED = """
import os, signal, sys
from largescale.run import folder
last, save, record = int(sys.argv.pop(1)), folder.RunFolder.save, folder.RunFolder.record_batch
def saving(self, *arguments, **options):
    save(self, *arguments, **options)
    self.saving.settle()
def recording(self, step, batch):
    if step > last:
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, step, batch)
folder.RunFolder.save, folder.RunFolder.record_batch = saving, recording
from largescale.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""The command, killed in the second step after the save of a step."""


def run_python(
    arguments: list[str], *, check: bool = False, timeout_s: float = 120, address_space: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` in a process of its own.

    Args:
        arguments: of the interpreter.
        check: raise if it fails.
        timeout_s: after which it is killed.
        address_space: limit in bytes, as `ulimit -v` sets it; 0 sets none.
    """

    def limit() -> None:
        if address_space:
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        preexec_fn=limit,
    )
    print(result.stdout, result.stderr, sep="\n", flush=True)  # kept beside the page if the case fails
    if check:
        result.check_returncode()
    return result


def _said(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return f"exit code {result.returncode}: {lines[-1] if lines else 'it said nothing'}"


def out_of_memory(report: Report, context: Context) -> None:
    """A batch that is far too large ends with one line and the code of a run that had to stop."""
    shards, cuda = _shards(context, 96, side=40), context.device == "cuda"
    big = [
        f"model.backbone={'resnet50' if cuda else 'resnet18'}",
        "train.global_batch=96",
        "data.streams=4",
        "train.precision=fp32",
        f"data.crops=[{{num: {8 if cuda else 6}, size: {480 if cuda else 256}}}]",
        "train.steps=1",
        f"data.shards={shards}",
        f"run.dir={Path(context.folder) / 'out-of-memory'}",
        "data.workers=0",
        "run.hang_timeout_s=0",
        "data.augment={flip: 0, jitter: 0, grayscale: 0, blur: 0}",
    ]
    result = pretrain(context, big, address_space=0 if cuda else _CPU_MEMORY)
    lines = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    said = lines[-1] if lines else _said(result)
    right = result.returncode != 0 and "Traceback" not in result.stderr and "memory" in said.lower()
    report.judge(
        "a batch that does not fit",
        right,
        f"exit code {result.returncode}, {'a traceback, ' if 'Traceback' in result.stderr else ''}{said}",
        exit_code=result.returncode,
        line=said[:160],
    )
