"""What a report says of runs, by their files: one alone, one under way, several side by side.

Covers: largescale/report/measurements.py, largescale/report/plots.py, largescale/report/reported_run.py,
largescale/report/settings.py, largescale/report/time_spent.py, largescale/report/training.py,
largescale/report/verdict.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from largescale.cli import main
from largescale.evaluate.made_from import VERSION
from largescale.evaluate.results import write_result
from largescale.methods import METHODS
from largescale.report import measurements, plots, settings, time_spent, training, verdict
from largescale.report.page import Wanted, report
from largescale.report.reported_run import read_runs
from largescale.run.lease import take_folder
from largescale.run.status import write_status
from tests.helpers.run_folders import make_run


def measured(path: Path, own: float, pixels: float, num_test: int = 1000, measure: str = "top1") -> None:
    shards = {"location": "/data/test", "name": "test", "fingerprint": "a"}
    made_from = {"version": VERSION, "weights": {"step": 4, "hash": "a"}, "images": {}}
    record = {
        "protocol": "knn",
        "settings": {"knn_temperature": 0.5},
        "num_test": num_test,
        "num_train": 9,
        "measured": "2026-01-01",
        "checkpoint_step": 4,
        "warnings": [],
        "results": {"pretrained": {measure: own}, "pixels": {measure: pixels}},
        "made_from": {**made_from, "train_shards": shards, "test_shards": shards},
    }
    write_result(path, record)


def kinds(path: Path) -> list[str]:
    (run,) = read_runs([path])
    return [answer.kind for answer in verdict.answers(run)]


def test_wilsons_interval_is_that_of_the_textbooks():
    assert measurements.interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert measurements.interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert measurements.interval(0.3, 0) == (0.3, 0.3)


def test_the_verdict_follows_the_loss_and_the_intervals(tmp_path):
    learning, flat = make_run(tmp_path / "a"), make_run(tmp_path / "b", fall=0, state="failed")
    assert kinds(learning) == ["good", "good", "open", "good"]
    assert kinds(flat) == ["bad", "open", "open", "good"]
    assert kinds(make_run(tmp_path / "c", num_lines=3))[1] == "open"
    for own, pixels, num_test, kind in ((0.8, 0.6, 1000, "good"), (0.8, 0.79, 1000, "open"), (0.6, 0.8, 1000, "bad")):
        measured(learning, own, pixels, num_test)
        assert kinds(learning)[2] == kind
    measured(learning, 0.8, 0.6, 10)  # so few test images say nothing
    assert kinds(learning)[2] == "open"
    for pixels in (0.1, 0.8):  # a mean average precision, of which no interval is known
        measured(learning, 0.6, pixels, measure="map")
        assert kinds(learning)[2] == "open"
    (run,) = read_runs([learning])
    assert list(verdict.answers(run))[2].text == "60.0 % against raw pixels 80.0 (-20.0 points, no interval)."


def test_a_running_average_starts_unbiased_and_keeps_constants():
    assert plots.smoothed(np.full(50, 7.0), 10) == pytest.approx(np.full(50, 7.0))
    noisy = np.random.default_rng(0).normal(size=400)
    smooth = plots.smoothed(noisy, 40)
    assert smooth[0] == noisy[0] and smooth[100:].std() < noisy.std() / 3


def test_names_may_look_like_tex():
    assert "<svg" in plots.in_page(plots.bars("what", [("a$x_{b$", 50.0, 40.0, 60.0, 0)]), "name", "what")


def test_time_adds_up(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a")])
    spent = time_spent.spent(run)
    assert run.seconds == pytest.approx(40.0) and time_spent.total(spent) == pytest.approx(50.0)
    assert spent == pytest.approx(
        {"computing": 20.0, "waiting for data": 12.0, "augmenting": 4.0, "saving": 4.0, "measuring online": 10.0}
    )
    run.metrics[0]["phase_s"] = 5.0  # before a step of the interval
    assert time_spent.spent(run) == pytest.approx({**spent, "computing": 15.0, "offline phases": 5.0})


def test_a_run_that_begins_at_a_later_step_took_no_time_for_those_before(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a")])
    later = replace(run, metrics=[{**run.metrics[10], "interval_steps": 2}, *run.metrics[11:]])
    assert later.interval_steps.tolist() == [2] * 30 and later.seconds == pytest.approx(30.0)
    seldom = replace(run, config=replace(run.config, run=replace(run.config.run, log_every=1)))  # on resume: 2 before
    assert seldom.seconds == run.seconds
    assert replace(run, metrics=[]).seconds == 0


def test_runs_are_compared_in_colours_and_settings(tmp_path):
    runs = read_runs(
        [make_run(tmp_path / name, f"optim.lr={lr}", f"name={name}") for name, lr in (("a", 0.5), ("b<", 2))]
    )
    page = training.section_of(runs, None)
    assert page.count("var(--line-0)") > 1 and page.count("var(--line-1)") > 1 and "b&lt;" in page and "b<" not in page
    titles = [panel.title for panel in training.panels_of(runs)]
    assert "Seconds per step: waiting for data" in titles and "Online knn" in titles and "Loss" in titles
    assert len([title for title in titles if "Images per second" in title]) == 0  # no run has it
    table = settings.differing(runs)
    assert "optim.lr" in table and "0.5" in table and "2.0" in table and "train.steps" not in table
    same = read_runs([tmp_path / "a", tmp_path / "a"])
    assert "No setting differs" in settings.differing(same) and same[0].label == str(tmp_path / "a")


def test_losses_below_zero_have_no_logarithm(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a")])
    simsiam = METHODS["simsiam"].Settings(name="simsiam")  # whose reference is -1
    run = replace(run, config=replace(run.config, method=simsiam))
    below = replace(run, metrics=[row | {"loss": row["loss"] - 4} for row in run.metrics])
    assert "loss-log" not in training.section_of([below], None) and "loss-log" in training.section_of([run], None)
    log = {panel.name: panel.log for panel in training.panels_of([below])}
    assert log["gradient-norm"] and not log["loss"]


def test_before_the_first_line_there_are_no_figures(tmp_path, capsys):
    path = make_run(tmp_path / "a", num_lines=0)
    assert main(["report", str(path), "--figures", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{path / 'report.html'}\n"


def test_a_page_of_several_runs(tmp_path, capsys):
    runs = [make_run(tmp_path / name, f"name={name}") for name in ("a", "b")]
    measured(runs[0], 0.8, 0.6)
    assert main(["report", *map(str, runs), "--smooth", "0"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "report.html")]
    page = (tmp_path / "report.html").read_text()
    assert "2 runs compared" in page and "77.4 to 82.4" in page and "running averages" not in page
    assert f"largescale report {runs[0]} {runs[1]}" in page and "x y" in page
    assert f"largescale evaluate knn {runs[0]}" in page and "evaluate.knn_temperature=0.5" in page


def test_a_folder_is_no_page(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert main(["report", str(run), "--out", str(tmp_path)]) == 2
    says = f"error: --out {tmp_path}: is a folder; name a file in it, such as {tmp_path / 'report.html'}\n"
    assert capsys.readouterr().err == says and not (run / "report.html").exists()


def test_a_run_under_way_says_where_it_stands_and_the_page_loads_itself_again(tmp_path):
    path = make_run(tmp_path / "a", num_lines=20)
    write_status(path, "running", 0, 100)
    lease = take_folder(path, lease_s=20, wait_s=0)
    written = report([path], Wanted(watch_s=0.01, figures=tmp_path))
    assert next(written) == path / "report.html"
    page = (path / "report.html").read_text()
    assert 'http-equiv="refresh" content="0.01"' in page and "Running, step 40 of 100 (40%)" in page
    assert "30 s left" in page
    lease.release()
    write_status(path, "complete", 100, 100)
    shown = set(tmp_path.glob("*.*"))
    for one in shown:
        one.write_text("of the first round")
    assert set(written) == shown and (tmp_path / "loss.svg") in shown
    assert all(one.stat().st_size > 1000 for one in shown)  # drawn again
    page = (path / "report.html").read_text()
    assert "http-equiv" not in page and "Complete, step 100 of 100" in page


def test_what_is_damaged_is_named_and_the_rest_is_shown(tmp_path):
    path = make_run(tmp_path / "a")
    for name in ("status.json", "environment.json"):
        (path / name).write_text("{")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 81}\n{"st')
    (run,) = read_runs([path])
    assert len(run.damage) == 3 and len(run.metrics) == 40
    assert main(["report", str(path)]) == 0
    assert "1 of 41 lines lack numbers" in (path / "report.html").read_text()


@pytest.mark.parametrize("arguments", [["--smooth", "-1"], ["--watch", "-1"], ["--watch", "nan"], [*["{run}"] * 16]])
def test_what_cannot_be_done_is_one_line(tmp_path, capsys, arguments):
    path = make_run(tmp_path / "a")
    assert main(["report", str(path), *(word.format(run=path) for word in arguments)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (path / "report.html").exists()
