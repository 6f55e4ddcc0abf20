"""Commands in odd surroundings: nobody reads, streams are closed, the locale is not UTF-8, the shell left a `~`.

Covers: shards/__main__.py, shards/cli.py, shards/ground/errors.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from largescale.config import load_config
from shards.cli import main
from shards.ground.terminal import fail_line
from tests.helpers.commands import ROOT
from tests.helpers.images import image_bytes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards whose names are not ASCII."""
    home = tmp_path_factory.mktemp("home")
    (home / "süß").mkdir()
    for number in range(3):
        (home / "süß" / f"é{number}.png").write_bytes(image_bytes(seed=number))
    assert main(["convert", str(home / "süß"), str(home / "süße-shards")]) == 0
    return home


def shell(home: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash with `shards` as a word of it."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; shards() {{ {sys.executable} -m shards "$@"; }}; cd {ROOT}; {command}'],
        env={**os.environ, "HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_output_that_nobody_reads_is_no_error(home):
    result = shell(home, f"shards info '{home}/süße-shards' | sleep 0")
    assert (result.returncode, result.stderr) in ((141, ""), (0, ""))


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_error(home, closed):
    assert shell(home, f"shards info '{home}/süße-shards' {closed}").returncode == 0


def test_messages_that_cannot_be_written_are_lost_and_the_work_goes_on(home):
    result = shell(home, f"shards verify '{home}/süße-shards' --workers 1 2>/dev/full")
    assert result.returncode == 0 and "3 samples in 1 shards are intact" in result.stdout


@pytest.mark.parametrize("command", ["info '{home}/süße-shards'", "--help"])
def test_output_that_cannot_be_written_is_a_line(home, command):
    result = shell(home, f"shards {command.format(home=home)} >/dev/full")
    assert result.returncode == 2 and result.stderr.startswith("error: standard output: No space left on device")
    assert result.stderr.count("\n") == 1


def test_a_locale_without_utf8_is_no_error(home, tmp_path):
    command = f"shards convert '{home}/süß' '{tmp_path}/ö' --workers 1 && shards info '{tmp_path}/ö'"
    result = shell(home, command, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 0 and "3 in 1 shards" in result.stdout, result.stderr


@pytest.mark.skipif(os.system("unshare -rm true 2>/dev/null") != 0, reason="no mount namespaces here")
def test_without_a_usable_dev_shm_a_line_says_so(home, tmp_path):
    read_only = "unshare -rm sh -c 'mount -t tmpfs -o ro none /dev/shm && exec \"$@\"' sh"
    result = shell(
        home,
        f"{read_only} {sys.executable} -m largescale pretrain tests/tiny.yaml run.dir={tmp_path}/run "
        f"data.shards='{home}/süße-shards' data.workers=1 train.global_batch=2 method.queue=0 "
        f"data.streams=2",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "error: /dev/shm: Read-only file system, which the locks of loader processes need; make it writable "
        "(containers: --shm-size), or set data.workers=0"
    )


def test_a_home_that_the_shell_did_not_replace(home, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(home))
    assert main(["info", "~/süße-shards"]) == 0
    config = load_config(
        ROOT / "tests" / "tiny.yaml",
        [
            "data.shards=[{path: ~/a, weight: 2}, '~/b']",
            "run.dir=~/run",
            "checkpoint.mirror=~/m",
            "data.eval_shards=~/e",
        ],
    )
    assert config.data.shards == [{"path": f"{home}/a", "weight": 2}, f"{home}/b"]
    assert (config.run.dir, config.checkpoint.mirror) == (f"{home}/run", f"{home}/m")
    assert config.data.eval_shards == f"{home}/e"


def test_a_line_stands_alone_where_a_progress_bar_was_interrupted(capsys):
    bar = tqdm(total=3, desc="convert", leave=False)
    assert fail_line("interrupted", 130) == 130
    bar.close()
    assert "\nerror: interrupted\n" in capsys.readouterr().err
    fail_line("why", 1)
    assert capsys.readouterr().err == "error: why\n"


IN_A_TEXT = "exec('raise KeyboardInterrupt')"
IN_THE_COMMAND = f"""
from shards.ground import terminal

def main():
    return terminal.run(command, None)

def command(argv):
    try:
        {IN_A_TEXT}
    except KeyboardInterrupt:
        return 130
"""
FINDER = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in ("shards.cli", "largescale.cli"):
            return importlib.util.spec_from_file_location(name, __file__.replace("sitecustomize", "other"))

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("package", ["shards", "largescale"])
@pytest.mark.parametrize("cli", [IN_A_TEXT, IN_THE_COMMAND], ids=["import", "command"])
def test_ctrl_c_while_a_text_is_executed_ends_with_the_exit_code_of_others(tmp_path, package, cli):
    """As when it comes while `dataclasses` makes a class."""
    (tmp_path / "sitecustomize.py").write_text(FINDER)
    (tmp_path / "other.py").write_text(cli)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-m", package], env=environment, capture_output=True, check=False, timeout=600
    )
    assert result.returncode == 130


def test_a_folder_in_place_of_a_file_is_named(home, capsys):
    assert main(["info", str(home / "süße-shards"), "--html", str(home)]) == 2
    assert capsys.readouterr().err == f"error: {home}: is a folder; name a file\n"
