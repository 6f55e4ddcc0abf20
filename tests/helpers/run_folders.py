"""Folders of runs as `largescale pretrain` leaves them, without training."""

from __future__ import annotations

import json
from pathlib import Path

from largescale.config import load_config, to_yaml
from largescale.run.status import write_status
from tests.helpers.commands import TINY


def make_run(path: Path, *overrides: str, fall: float = 1.0, num_lines: int = 40, state: str = "complete") -> Path:
    """The folder of a run whose loss falls by `fall`, with a line every second step."""
    path.mkdir(parents=True)
    config = load_config(TINY, [f"run.dir={path}", "data.shards=/data/train", "run.log_every=2", *overrides])
    (path / "config.yaml").write_text(to_yaml(config))
    rows = [
        {
            "step": 2 * number + 1,
            "progress": (number + 1) / num_lines,
            "epoch": number / 4,
            "images_seen": 32 * (number + 1),
            "lr": 0.1,
            "grad_norm": 1.0 + number,
            "loss": 3 - fall * number / num_lines + 0.01 * (-1) ** number,
            "step_s": 0.5,
            "data_wait_s": 0.2,
            "augment_s": 0.05,
            "save_s": 0.1,
            "skipped_samples": 0,
            "online_knn": 0.5,
            "online_s": 0.25,
        }
        for number in range(num_lines)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "environment.json").write_text(json.dumps({"world_size": 2, "command": ["largescale", "pretrain", "x y"]}))
    write_status(path, state, 2 * num_lines, 2 * num_lines)
    return path
