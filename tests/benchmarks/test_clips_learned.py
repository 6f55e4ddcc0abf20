from __future__ import annotations

import json
from pathlib import Path

from benchmarks import clips_learned


def test_a_run_that_is_complete_is_trained_again(monkeypatch, tmp_path):
    run, commands = tmp_path / "opn-steady-seed0", []

    def command(*words: str) -> None:
        commands.append(words[0])
        if words[0] == "pretrain":
            assert not run.exists()
            (run / "eval").mkdir(parents=True)
        else:
            results = {name: {"task_accuracy": 0.5, "task_chance": 0.1} for name in ("pretrained", "untrained")}
            (run / "eval" / "own-task.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(clips_learned, "RUNS", tmp_path)
    monkeypatch.setattr(clips_learned, "command", command)
    monkeypatch.setattr(clips_learned, "shards_of", lambda kind, part: Path(kind) / part)
    rows = [clips_learned.measure("opn", "steady", 0) for _ in range(2)]
    assert commands == 2 * ["pretrain", "evaluate"] and rows[1]["accuracy"] == 50
