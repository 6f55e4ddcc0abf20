"""SimCLR, BYOL, Barlow Twins and VICReg beside the same methods of lightly and solo-learn, on the same views.

    pip install lightly && pip install --no-deps solo-learn     # for this benchmark only
    python -m benchmarks.peers [--epochs 6.5] [--seeds 0] [--methods simclr ...]

Three networks are trained in one process and in turns, on the very same views of the demo's images (`make pretrain`
makes the shards) from the same first weights of the backbone: by this project's engine, and by a plain loop with the
heads and losses of each library. Rates, decay, steps and the widths of heads are those of the recipe in configs/small;
heads are otherwise each library's own. A step's time is the processor's, of one thread, without the views. Writes
benchmarks/results/peers.{json,md}; other methods, seeds and lengths keep their rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from benchmarks.peer_steps import PeerStep
from largescale.config import Config, load_config
from largescale.data.stream import Stream
from largescale.data.views import Views
from largescale.evaluate import knn, linear
from largescale.evaluate.extract import extract, labelled_corpus
from largescale.methods import build_method
from largescale.methods.multi_crop import each_view
from largescale.optim.schedules import learning_rates
from largescale.parallel import precision
from largescale.parallel.strategies import build_engine

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks/results/peers"
LIBRARIES = ("lightly", "solo-learn")
METHODS = {
    "simclr": [],
    "byol": [],
    "barlow": ["method.hidden=[512,512]"],  # the heads of the libraries have three layers
    "vicreg": ["method.hidden=[512,512]"],
}
CPU = torch.device("cpu")


def measured(config: Config) -> list[dict[str, Any]]:
    """Train the three networks of one method and seed: a row each."""
    stream = Stream(config, rank=0, world_size=1, device=CPU, dtype=precision.views_dtype(config))
    num_steps = stream.num_steps
    rates = learning_rates(config, num_steps=num_steps, steps_per_epoch=stream.order.steps_per_epoch)
    backbones, steps = {}, dict[str, Callable[[Views, int], object]]()
    backbones["ours"], steps["ours"] = ours(config, stream, rates)
    for library in LIBRARIES:
        peer = PeerStep(config, library, num_steps)
        assert all(map(torch.equal, peer.backbone.parameters(), backbones["ours"].parameters()))
        backbones[library] = peer.backbone
        steps[library] = lambda views, step, peer=peer: peer(each_view(views), float(rates[step]))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with closing(stream(range(num_steps))) as batches:
        for step, batch in enumerate(tqdm(batches, total=num_steps, desc=config.name)):
            views = batch.inputs()
            for name in sorted(steps, key=lambda name: (list(steps).index(name) + step) % len(steps)):
                started = time.process_time()
                steps[name](views, step)
                seconds[name].append(time.process_time() - started)
    accuracies = accuracies_of(config, backbones)
    return [
        {
            "method": config.method.name,
            "library": name,
            "seed": config.run.seed,
            "epochs": config.train.epochs,
            **accuracies[name],
            "step_ms": 1000 * statistics.median(seconds[name]),
            "to_ours": statistics.median(own / mine for own, mine in zip(seconds[name], seconds["ours"], strict=True)),
        }
        for name in steps
    ]


def ours(config: Config, stream: Stream, rates: Any) -> tuple[nn.Module, Callable[[Views, int], object]]:
    """The backbone, and what takes a step with it: the lines of the loop that compute."""
    torch.manual_seed(config.run.seed)
    engine = build_engine(build_method(config, stream.length), config, CPU)

    def take(views: Views, step: int) -> None:
        output = engine.forward_backward(views, step)
        check = engine.check(views, output.loss)
        engine.update(check, step=step, lr=float(rates[step]), clip=config.optim.clip_grad_norm)

    return engine.method.backbone, take


def accuracies_of(config: Config, backbones: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """kNN and linear of frozen features, in percent."""
    networks = {name: backbone.eval() for name, backbone in backbones.items()}
    train, test = (
        extract(labelled_corpus(place, "shards", config), config, networks, CPU)
        for place in (config.data.shards, config.data.eval_shards)
    )
    return {
        name: {
            protocol.__name__.rsplit(".", 1)[-1]: 100
            * protocol.measure(train[name], test[name], config.evaluate)["top1"]
            for protocol in (knn, linear)
        }
        for name in networks
    }


def place(row: dict[str, Any]) -> tuple[bool, str]:
    """Ours first, then the libraries."""
    return row["library"] != "ours", row["library"]


def means(rows: list[dict[str, Any]]) -> list[str]:
    """A table of means over seeds, with the standard deviation of one seed."""
    lines = ["| method | library | seeds | kNN | linear | to ours |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, bool, str], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["method"], *place(row))):
        groups.setdefault((row["method"], *place(row)), []).append(row)
    for (method, _, library), group in groups.items():
        knn, linear = (
            f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"
            for values in ([row[name] for row in group] for name in ("knn", "linear"))
        )
        ratio = statistics.median(row["to_ours"] for row in group)
        lines.append(f"| {method} | {library} | {len(group)} | {knn} | {linear} | {ratio:.2f} |")
    return lines


REMARK = """
Most rows were made before float32 was convolved on AMD's CPUs where maps are small, and before a rank by itself went
without DDP's buckets. Since then, over 25 steps in turns on an AMD EPYC, lightly and solo-learn took 1.05 and 1.01 of
our time with SimCLR, 0.98 and 0.99 with BYOL.""".splitlines()


def page(rows: list[dict[str, Any]]) -> str:
    """Tables for people: two per length."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    lines = [
        "# Beside lightly and solo-learn",
        "",
        f"`python -m benchmarks.peers`, {libraries}, torch {torch.__version__}, {platform.machine()}, one thread.",
        "Three networks in turns on the same views, from the same first weights of the backbone; top-1 in percent on",
        "2,000 test images, of which one number's sampling error is about 0.8. Milliseconds are the processor's of a",
        "step (median); the ratio to ours is the median over pairs of steps on the same views. Seeds were run at",
        "different times beside other work, so that milliseconds of different rows do not compare.",
        *REMARK,
    ]
    for epochs in sorted({row["epochs"] for row in rows}):
        own = [row for row in rows if row["epochs"] == epochs]
        lines += ["", f"## {epochs:g} epochs", "", *means(own), ""]
        lines += ["| method | library | seed | kNN | linear | step ms | to ours |", "|---|---|---|---|---|---|---|"]
        for row in sorted(own, key=lambda row: (row["method"], row["seed"], *place(row))):
            lines.append(
                f"| {row['method']} | {row['library']} | {row['seed']} | {row['knn']:.2f} | {row['linear']:.2f} | "
                f"{row['step_ms']:.0f} | {row['to_ours']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=6.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = OUT.with_suffix(".json")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
        for name in arguments.methods:
            for seed in arguments.seeds:
                settings = [f"run.seed={seed}", f"train.epochs={arguments.epochs:g}", *METHODS[name]]
                config = load_config(ROOT / "configs/small" / f"{name}.yaml", settings)
                found = measured(config)
                rows = json.loads(known.read_text()) if known.exists() else []
                key = ("method", "seed", "epochs")
                rows = [row for row in rows if any(row[one] != found[0][one] for one in key)] + found
                known.write_text(json.dumps(rows, indent=1) + "\n")
                OUT.with_suffix(".md").write_text(page(rows))
                for row in found:
                    print(json.dumps(row), flush=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
