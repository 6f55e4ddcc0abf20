"""Memory that really runs out: the line says what fits, and that does fit.

Covers: largescale/distributed/out_of_memory.py, largescale/plan/what_fits.py, largescale/run/memory.py
"""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from largescale.config import load_config, to_yaml
from largescale.distributed.out_of_memory import OutOfMemory, line_of_memory
from largescale.evaluate.extract import extract, labelled_corpus
from largescale.plan import what_fits
from largescale.plan.simulate import simulate
from largescale.run.memory import footprint, host_bytes
from largescale.run.memory_advice import _RAN_OUT, _SAID, _let_first_speak, _worded, memory_advice
from largescale.run.status import read_status
from shards.cli import main as shards
from shards.format.manifest import read_manifest
from tests.helpers.commands import ROOT, run_python
from tests.helpers.streams import make_stream
from tests.methods.harness import mini

TINY = ROOT / "tests" / "tiny.yaml"
LARGE = [
    "train.global_batch=128",
    "train.steps=1",
    "method.queue=0",
    "model.width=16",
    "train.precision=fp32",
    "data.crops=[{num: 2, size: 112}]",
    "data.audit=false",
    "run.hang_timeout_s=0",
]


@contextmanager
def more_memory_at_most(num_bytes: float) -> Iterator[None]:
    """This process may grow by so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (footprint().mapped + int(num_bytes), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


ONE_IMAGE = """
import ctypes, resource, sys
from largescale.distributed.out_of_memory import OutOfMemory
from largescale.plan import what_fits
from largescale.plan.simulate import simulate
from largescale.run.memory import footprint
from tests.helpers.streams import make_stream

M_ARENA_MAX = -8  # of mallopt(3): else a thread may reserve 64 MB of addresses for itself, or not
shards, room = sys.argv[1:]
batches = make_stream(shards, "data.workers=1", "data.threads=1", "train.global_batch=4", "method.queue=0")(range(3))
ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
limit = footprint().mapped + int(float(room))
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    print(next(batches).step)
except OutOfMemory as error:
    print(error)
"""


LIMITED = """
import resource, sys
import largescale.pretrain
from largescale.cli import main
from largescale.run import memory_advice
from largescale.run.memory import _bytes_of, footprint

memory_advice.LIMIT_S = 200  # this machine may be busy
here, *command = sys.argv[1:]
large = command[:command.index("end-of-large")]
main([*large, "train.global_batch=16", f"run.dir={here}/small"])  # loads all libraries
before = footprint().mapped
main([*large, f"run.dir={here}/large"])
need = _bytes_of("/proc/self/status", "VmPeak") - before
limit = footprint().mapped + int(0.8 * need)  # half a batch at a time takes about 0.64 of it
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
sys.exit(main([argument for argument in command if argument != "end-of-large"]))
"""

EXACT_ADDRESSES = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""What is freed is given back, and threads reserve nothing: addresses are what is used, on any machine."""


@pytest.mark.slow
def test_a_step_that_does_not_fit_is_told_what_does_and_that_fits(tiny_overrides, tmp_path, monkeypatch):
    """In new processes: one that has run other tests has room left from them."""
    for name, value in EXACT_ADDRESSES.items():
        monkeypatch.setenv(name, value)
    command = ["pretrain", TINY, *tiny_overrides(*LARGE), "end-of-large"]
    failed = run_python("-c", LIMITED, tmp_path / "first", *command, check=False)
    assert failed.returncode == 3, failed.stderr
    line = failed.stderr.splitlines()[-1]
    advice = re.fullmatch(
        r"error: out of memory \(.*\); run the same command with (\S+), which fits "
        r"\(`largescale plan` says \S+ instead of \S+ GB, 0.\d GB are available\)",
        line,
    )
    assert advice, line
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and status["reason"] == line.removeprefix("error: ")
    run_python("-c", LIMITED, tmp_path / "second", *command, advice.group(1))


def test_it_is_planned_for_the_images_of_the_run_and_their_offline_phases(shard_folder, monkeypatch, capsys):
    words = ["train.precision=fp32", "train.steps=0", "train.epochs=3", "train.global_batch=8", "evaluate.batch=200"]
    config = mini("pcl", f"data.shards={shard_folder}", "method.warmup_epochs=1", *words)
    step = simulate(config, 1, read_manifest(shard_folder).num_samples)
    assert step.held_in_a_phase > step.peak
    request = {"config": to_yaml(config), "ranks": 1, "available": 10**12, "on_gpu": True, "cpu_s": 60}
    monkeypatch.setattr("sys.stdin", StringIO(json.dumps(request)))
    for name in ("die_with_parent", "resource.setrlimit"):  # they are for a process of its own
        monkeypatch.setattr(f"largescale.plan.what_fits.{name}", lambda *arguments: None)
    monkeypatch.setattr("largescale.plan.what_fits.fitting_changes", lambda *arguments, **others: [])
    what_fits.main()
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["needed"] == pytest.approx((step.most_held + 1.5e9) * 1.1)


def test_what_is_said_of_a_run_that_has_begun(tmp_path):
    config = load_config(TINY, ["data.shards=x", f"run.dir={tmp_path}/run"])
    failed = {"needed": 9e9}
    accumulate = {"overrides": ["train.accumulate=2"], "needed": 5e9, "fits": True}
    fsdp = {"overrides": ["parallel.strategy=fsdp"], "needed": 6e9, "fits": True}
    assert _worded(config, [failed, accumulate], int(5.5e9)) == (
        "run the same command with train.accumulate=2, which fits (`largescale plan` says 5.0 instead of 9.0 GB, "
        "5.5 GB are available)"
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(json.dumps({"step": 4, "files": {"x": {"size": 0, "sha256": ""}}}))
    assert "with parallel.strategy=fsdp, which" in _worded(config, [failed, fsdp], int(7e9))
    again = f"init_from={tmp_path}/run run.dir={tmp_path}/run-2 train.accumulate=2, which fits"
    assert again in _worded(config, [failed, accumulate], int(7e9))
    nothing_fits = _worded(config, [failed, {**fsdp, "fits": False}], int(5e9))
    assert "no change tried fits, not even parallel.strategy=fsdp (" in nothing_fits
    for too_late in ([], [failed]):
        assert "lower train.global_batch" in _worded(config, too_late, int(7e9))


def test_advice_never_fails_and_other_errors_pass(tmp_path, monkeypatch):
    config = load_config(TINY, ["data.shards=x", f"run.dir={tmp_path}"])
    with pytest.raises(ZeroDivisionError), memory_advice(config):
        raise ZeroDivisionError
    monkeypatch.setattr("sys.executable", str(tmp_path / "nothing"))
    with pytest.raises(OutOfMemory, match=r"out of memory \(.*\); lower train.global_batch"), memory_advice(config):
        torch.empty(2**50)
    with pytest.raises(OutOfMemory, match="ulimit -u"), memory_advice(config):
        raise RuntimeError("can't start new thread")


def test_training_starts_where_there_is_no_proc(tmp_path, monkeypatch):
    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("largescale.run.memory.open", missing, raising=False)
    config = load_config(TINY, ["data.shards=x", f"run.dir={tmp_path}"])
    with pytest.raises(RuntimeError, match="the run's own"), memory_advice(config):
        raise RuntimeError("the run's own")  # it had begun, and its errors stay what they are


def test_loading_and_evaluating_have_settings_of_their_own(shard_folder):
    with pytest.raises(OutOfMemory, match=r"loaded batches of .* GB: lower data\.prefetch=1000"):
        next(make_stream(shard_folder, "data.workers=1", "data.prefetch=1000", "data.crops.0.size=16384")(range(3)))
    config = load_config(TINY, [f"data.shards={shard_folder}", "evaluate.batch=50"])
    corpus = labelled_corpus(str(shard_folder), "data.eval_shards", config)
    with pytest.raises(OutOfMemory, match=r"lower evaluate\.batch=50"):
        extract(corpus, config, {"large": lambda images: torch.empty(2**50)}, torch.device("cpu"))


def test_a_loader_process_without_memory_for_an_image_says_so(tmp_path):
    (tmp_path / "images").mkdir()
    for grey in range(4):
        Image.new("L", (6000, 6000), grey).save(tmp_path / "images" / f"{grey}.png", compress_level=1)
    assert shards(["convert", str(tmp_path / "images"), str(tmp_path / "large"), "--workers", "1"]) == 0
    # 36 MB as it is stored and 108 MB in colours; in a process whose memory no other test has used.
    found = [run_python("-c", ONE_IMAGE, tmp_path / "large", room).stdout for room in (130e6, 1e9)]
    assert re.search("6000 x 6000 .* in loader process 0: lower data", found[0])
    assert found[1] == "0\n"


def test_the_line_is_short():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    assert line_of_memory(caught.value) == (
        "out of memory (DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes)"
    )
    worker = MemoryError(
        "Caught MemoryError in DataLoader worker process 0.\n"
        "Original Traceback (most recent call last):\n  File ...\nMemoryError: an image\n"
    )
    assert line_of_memory(worker, "lower x") == "out of memory (an image); lower x"


def test_what_is_there(tmp_path: Path):
    start = footprint()
    with more_memory_at_most(1e9):
        assert 0.9e9 < host_bytes(1, start) < 1.1e9
    assert 0 < host_bytes(4, start) < host_bytes(1, start)


def test_a_guess_is_said_to_be_one_and_gives_way_to_what_was_planned(tmp_path):
    config = load_config(TINY, ["data.shards=x", f"run.dir={tmp_path}/run"])
    failed = {"needed": 9e9}
    guess = {"overrides": ["train.accumulate=2"], "needed": 5e9, "fits": True, "guessed": True}
    too_large = {"overrides": ["model.recompute_stages=[1]"], "needed": 7e9, "fits": False}
    planned = {**guess, "needed": 4.8e9, "guessed": False}
    for rows in ([failed, guess], [failed, guess, too_large]):
        assert _worded(config, rows, int(5.5e9)) == (
            "run the same command with train.accumulate=2, which should fit (`largescale plan` says about 5.0 instead "
            "of 9.0 GB, 5.5 GB are available)"
        )
    assert "train.accumulate=2, which fits (`largescale plan` says 4.8" in _worded(
        config, [failed, guess, too_large, planned], int(5.5e9)
    )
    wrong = _worded(config, [failed, guess, {**planned, "needed": 6e9, "fits": False}], int(5.5e9))
    assert "no change tried fits, not even train.accumulate=2 (`largescale plan` says 6.0" in wrong


def test_other_ranks_wait_for_the_first_that_ran_out(monkeypatch):
    monkeypatch.setattr("largescale.distributed.stopping._since", [])
    store = HashStore()
    store.add(_RAN_OUT, 1)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(_let_first_speak, store) for _ in range(2)]
        assert not any(one.done() for one in waiting)
        store.set(_SAID, "1")
        assert [one.result(600) for one in waiting] == [None, None]
    monkeypatch.setattr("largescale.distributed.stopping._since", [0.0])
    _let_first_speak(HashStore())  # a signal came: it does not wait
