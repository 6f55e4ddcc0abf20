"""Wrong arguments of both commands are one line."""

from __future__ import annotations

import pytest

from largescale.cli import main as largescale
from shards.cli import main as shards


@pytest.mark.parametrize(
    "command, words, expected",
    [
        (
            shards,
            "convert photos data --label folder",
            "unknown option --label; did you mean --labels?; see `shards convert --help`",
        ),
        (
            shards,
            "convert photos data --labels=folders",
            "argument --labels: expected none, folder, cls or column:NAME",
        ),
        (shards, "convert photos data --xyzzy", "unknown option --xyzzy; see `shards convert --help`"),
        (shards, "convert photos", "the following arguments are required: OUT; see `shards convert --help`"),
        (shards, "conver photos data", "argument COMMAND: invalid choice: 'conver'"),
        (largescale, "init data --hour=2 --gpu_s 3", "unknown option --gpu_s; did you mean --gpus?"),
        (largescale, "evaluate knn run --debugg evaluate.batch=3", "unknown option --debugg; did you mean --debug?"),
        (largescale, "evaluate", "the following arguments are required: PROTOCOL, RUN"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, command, words, expected):
    with pytest.raises(SystemExit) as leaving:
        command(words.split())
    message = capsys.readouterr().err
    assert leaving.value.code == 2
    assert message.startswith(f"error: {expected}") and message.count("\n") == 1
