"""Memory and time of swapped prediction: as it is written down, and as this package computes it.

    python -m benchmarks.swapped [--images 64] [--prototypes 3000 16000 100000]

Two large and six small views. Each form, forward and backward on one process in a process of its own: on a GPU its peak
of allocated memory, on a CPU that of resident memory, less what was there before. Writes benchmarks/results/swapped.md.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from benchmarks.gram import hardware
from largescale.methods.losses import swapped_prediction

RESULTS = Path(__file__).resolve().parent / "results"
VIEWS, ASSIGNED, TEMPERATURE, REPEATS = 8, 2, 0.1, 3
HEADER = ["prototypes", "form", "loss", "scores, GB", "peak beyond them, GB", "times the scores", "ms"]


def written_down(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """With the log-probabilities of all views at once."""
    log_p = log_softmax(scores / temperature, dim=-1)
    others = log_p.sum(0) - log_p[: len(codes)]
    return -(codes * others).sum() / (len(codes) * (len(scores) - 1) * scores.shape[1])


FORMS = {"written down": written_down, "ours": swapped_prediction}


def measure(form: str, images: int, prototypes: int, device: str) -> tuple[float, float, float]:
    """The loss, peak of memory in bytes beyond scores and codes, and the fastest of some repeats in seconds."""
    generator = torch.Generator().manual_seed(0)
    scores = (torch.rand(VIEWS, images, prototypes, generator=generator) * 2 - 1).to(device).requires_grad_()
    codes = (scores.detach()[:ASSIGNED] / 0.05).softmax(-1)
    FORMS[form](scores[:, :1, :64], codes[:, :1, :64], TEMPERATURE).backward()
    scores.grad = None
    before, seconds = allocated(device), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        loss = FORMS[form](scores, codes, TEMPERATURE)
        (gradient,) = torch.autograd.grad(loss, scores)
        value = loss.item() + 0 * gradient.flatten()[0].item()
        seconds.append(time.perf_counter() - start)
        del loss, gradient
    return value, peak(device) - before, min(seconds)


def allocated(device: str) -> int:
    """Bytes in use; the peak is counted from here on."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak(device: str) -> int:
    """Bytes in use at most since `allocated`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--prototypes", type=int, nargs="+", default=[3000, 16000, 100000])
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for prototypes in arguments.prototypes:
        size = 4 * VIEWS * arguments.images * prototypes
        for form in FORMS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                value, peak, seconds = pool.apply(measure, (form, arguments.images, prototypes, device))
            cells = [
                f"{value:.6g}",
                f"{size / 1e9:.3f}",
                f"{peak / 1e9:.3f}",
                f"{peak / size:.2f}",
                f"{1e3 * seconds:.1f}",
            ]
            rows.append([str(prototypes), form, *cells])
    lines = [" | ".join(cells) for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    about = (
        f"`python -m benchmarks.swapped` on {datetime.date.today()}: {hardware(device)}, torch {torch.__version__}, "
        f"float32, {arguments.images} images, {VIEWS} views of which {ASSIGNED} are assigned, one process. Peak memory "
        "of forward and backward beyond scores and codes: the gradient alone is 1.00 times the scores. The fastest of "
        f"{REPEATS} repeats; times include whatever else the machine did."
    )
    path = RESULTS / "swapped.md"
    path.write_text(f"# Swapped prediction\n\n{about}\n\n" + "".join(f"| {line} |\n" for line in lines))
    print(path.read_text())


if __name__ == "__main__":
    main()
