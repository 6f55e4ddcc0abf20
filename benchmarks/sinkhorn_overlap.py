"""What a training step waits for SwAV's codes, computed beside the network or in its way, in turns.

    python benchmarks/sinkhorn_overlap.py [--ranks 2 4] [--batches 32 8] [--delays 0 5 20] [--rounds 8]

Two runs of the same network, `method.overlap_codes=true` and `false`, take a step each in every round, so that what
else the machine does meets both; the order changes from round to round. Every all-reduce of Sinkhorn is held up by so
many milliseconds, as a slow network would. "Exposed" is the time that the training thread spends on codes: all of
Sinkhorn where it is in the way, else starting it and waiting for what is left. Writes
benchmarks/results/sinkhorn_overlap.md and docs/sinkhorn-overlap.svg, the timeline of the step of each form that exposes
a median time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from largescale.config import Config, load_config
from largescale.data.views import Views
from largescale.distributed.collectives import exchanged
from largescale.methods import build_method
from largescale.parallel.engine import Engine
from largescale.parallel.strategies import build_engine
from largescale.run.environment import environment

ROOT = Path(__file__).resolve().parent.parent
FORMS = {"in the way": False, "beside": True}
SETTINGS = [
    "data.shards=unused",
    "data.crops=[{num: 2, size: 64}, {num: 6, size: 32}]",
    "method.head_per_group=true",
    "method.prototypes=3000",
    "method.queue=0",
    "optim.name=sgd",
    "train.precision=fp32",
]
COLOURS = {
    "large crops": "#4878a8",
    "small crops": "#9ec1de",
    "backward": "#c9c9c9",
    "codes": "#e08214",
    "wait": "#b2182b",
}


class Span(NamedTuple):
    """What a thread did, in seconds of the monotonic clock."""

    what: str
    thread: str
    begin: float
    end: float


class Run:
    """An engine whose parts are timed.

    Attributes:
        spans: of the last step.
    """

    def __init__(self, config: Config, batch: int) -> None:
        torch.manual_seed(0)
        self.engine: Engine = build_engine(build_method(config), config, torch.device("cpu"))
        self.spans: list[Span] = []
        generator = torch.Generator().manual_seed(dist.get_rank())
        images = [torch.randn(g.num * batch, 3, g.size, g.size, generator=generator) for g in config.data.crops]
        self.views = Views.numbered(images, batch)
        method: Any = self.engine.method
        sizes = {
            group.size: name for group, name in zip(config.data.crops, ("large crops", "small crops"), strict=True)
        }
        method.backbone.forward = self._timed(lambda images: sizes[images.shape[-1]], method.backbone.forward)
        method._codes = self._timed(lambda *_: "codes", method._codes)
        self.engine.backward = self._timed(lambda _: "backward", self.engine.backward)  # type: ignore[method-assign]
        if method._beside is not None:
            start = self._timed(lambda *_: "wait", method._beside.start)
            method._beside.start = lambda *arguments: self._timed(lambda: "wait", start(*arguments))

    def step(self, number: int) -> tuple[float, float]:
        """Seconds of a step, and of what the training thread spent on codes."""
        self.spans.clear()
        dist.barrier()
        began = time.perf_counter()
        output = self.engine.forward_backward(self.views, number)
        check = self.engine.check(self.views, output.loss)
        self.engine.update(check, step=number, lr=0.01, clip=0.0)
        took = time.perf_counter() - began
        own = [span for span in self.spans if span.thread == "MainThread" and span.what in ("codes", "wait")]
        return took, sum(span.end - span.begin for span in own)

    def _timed(self, name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                thread = threading.current_thread().name
                self.spans.append(Span(name(*arguments), thread, began, time.perf_counter()))

        return call


def measure(rank: int, ranks: int, batch: int, delays: list[float], rounds: int, folder: str) -> None:
    """Time all delays on this rank, over gloo; rank 0 writes `rows.json` to the folder that the ranks meet in.

    Collectives: every rank must call it.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    delay_s = [0.0]
    all_reduce = dist.all_reduce

    def delayed(*arguments: Any, **options: Any) -> Any:
        if exchanged("") == "Sinkhorn's marginals":
            time.sleep(delay_s[0])
        return all_reduce(*arguments, **options)

    dist.all_reduce = delayed
    runs = {name: Run(configuration(ranks * batch, beside), batch) for name, beside in FORMS.items()}
    rows, timeline = [], {}
    for delay in delays:
        delay_s[0] = delay / 1000
        times: dict[str, list[list[float]]] = {name: [] for name in runs}
        spans: dict[str, list[list[Span]]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name in list(runs) if number % 2 else list(runs)[::-1]:
                # Of a step of all ranks: the mean over them.
                sums = torch.tensor(runs[name].step(number), dtype=torch.float64)
                dist.all_reduce(sums)
                if number:  # the first one warms up
                    times[name].append((sums / ranks).tolist())
                    spans[name].append(list(runs[name].spans))
        rows.append({"ranks": ranks, "batch": batch, "delay_ms": delay, **{name: times[name] for name in runs}})
        timeline = {name: steps[middle([exposed for _, exposed in times[name]])] for name, steps in spans.items()}
    if rank == 0:
        found = {"rows": rows, "timeline": timeline, "delay_ms": delays[-1], "environment": environment()}
        (Path(folder) / "rows.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def middle(values: list[float]) -> int:
    """The place of the median, of an even number the smaller one of the two in the middle."""
    return sorted(range(len(values)), key=values.__getitem__)[(len(values) - 1) // 2]


def configuration(global_batch: int, beside: bool) -> Config:
    """The configuration of one form."""
    overrides = [*SETTINGS, f"train.global_batch={global_batch}", f"method.overlap_codes={beside}"]
    return load_config(ROOT / "configs/swav/own_images_cpu.yaml", overrides)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: medians over rounds, and of the ratios within a round."""
    lines = [
        "| ranks | images per rank | delay of each all-reduce | exposed, in the way | exposed, beside "
        "| share of the step, in the way | beside | step, beside / in the way |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        way, beside = row["in the way"], row["beside"]
        exposed = [1000 * statistics.median(seconds for _, seconds in form) for form in (way, beside)]
        shares = [statistics.median(seconds / step for step, seconds in form) for form in (way, beside)]
        ratio = statistics.median(b[0] / a[0] for a, b in zip(way, beside, strict=True))
        lines.append(
            f"| {row['ranks']} | {row['batch']} | {row['delay_ms']:g} ms | {exposed[0]:.1f} ms | {exposed[1]:.2f} ms "
            f"| {shares[0]:.1%} | {shares[1]:.2%} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def draw(timeline: dict[str, list[list[Any]]], delay_ms: float, path: Path) -> None:
    """One step of each form: its training thread, and the thread of the codes if there is one."""
    figure, axes = plt.subplots(len(timeline), 1, figsize=(8, 3.4), sharex=True)
    for (name, listed), axis in zip(timeline.items(), axes, strict=True):
        spans = [Span(*span) for span in listed]
        origin = min(span.begin for span in spans)
        lanes = ["MainThread", "beside"]
        for what, colour in COLOURS.items():
            own = [span for span in spans if span.what == what]
            for lane, thread in enumerate(lanes):
                bars = [(1000 * (s.begin - origin), 1000 * (s.end - s.begin)) for s in own if s.thread == thread]
                axis.broken_barh(bars, (-lane - 0.4, 0.8), color=colour, label=what if lane == 0 else None)
        axis.set_yticks([0, -1], ["training", "codes"])
        axis.set_ylim(-1.5, 0.5)
        axis.set_title(f"codes {name}", loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"milliseconds; every all-reduce of Sinkhorn takes {delay_ms:g} ms more")
    axes[0].legend(frameon=False, fontsize=7, ncols=len(COLOURS), loc="lower right", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def write(found: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The page and the picture, which is of the first number of ranks and of images."""
    machine = found[0]["environment"]
    (ROOT / "benchmarks/results/sinkhorn_overlap.md").write_text(
        "# Codes beside the network\n\n"
        f"`python benchmarks/sinkhorn_overlap.py` on {time.strftime('%Y-%m-%d')}: {machine['processor']}, "
        f"{machine['cpu_cores']} cores, torch {machine['torch']}, gloo ranks of one thread on one machine, ddp, "
        f"the network of own_images_cpu.yaml, 2 x 64 px + 6 x 32 px, 3000 prototypes, "
        f"fp32; medians of {arguments.rounds} paired rounds. {arguments.remark}\n\n"
        "Exposed is what the training thread spends on codes: all of Sinkhorn where it is in the way, else starting it "
        f"and waiting for what is left.\n\n{table([row for one in found for row in one['rows']])}\n\n"
        "Codes that take longer than the small crops are waited for until they are there; that a rank is slowed by "
        f"other work delays those of all ranks.\n\nA step with {found[0]['rows'][0]['ranks']} ranks and "
        f"{found[0]['rows'][0]['batch']} images on each:\n\n"
        "![timeline](../../docs/sinkhorn-overlap.svg)\n"
    )
    draw(found[0]["timeline"], found[0]["delay_ms"], ROOT / "docs/sinkhorn-overlap.svg")


def main() -> None:
    """Measure, write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 8], help="images per rank")
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 5, 20], help="milliseconds")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--remark", default="", help="of the machine, a sentence for the page")
    arguments = parser.parse_args()
    found = []
    for ranks, batch in product(arguments.ranks, arguments.batches):
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(measure, (ranks, batch, arguments.delays, arguments.rounds, folder), ranks)
            found.append(json.loads((Path(folder) / "rows.json").read_text()))
            write(found, arguments)


if __name__ == "__main__":
    main()
