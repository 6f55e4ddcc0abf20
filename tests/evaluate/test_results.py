"""Result files are shown as they were measured, or not at all.

Covers: largescale/evaluate/headline.py, largescale/report/evaluation.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from largescale.config import Config
from largescale.evaluate.results import Results, read_results, write_result
from largescale.evaluate.table_of_runs import table
from largescale.report import evaluation, verdict
from largescale.report.reported_run import ReportedRun
from largescale.run.status import RunStatus
from tests.helpers.results import record


def reported(path: Path, found: Results) -> ReportedRun:
    status = RunStatus("complete", 4, 4, "", "", None)
    return ReportedRun(path, "a", 0, Config(), [], found, {}, status, [])


def edited(text: str) -> str:
    return text.replace('"top1": 0.5', '"top1": 0.9')


def cut(text: str) -> str:
    return text[: len(text) // 2]


def of_an_older_version(text: str) -> str:
    return json.dumps({key: value for key, value in json.loads(text).items() if key != "checksum"})


def nested(_: str) -> str:
    return 9999 * "["


@pytest.mark.parametrize("change", [edited, cut, of_an_older_version, nested, lambda _: "[]", lambda _: ""])
def test_a_result_that_was_changed_is_not_shown_and_named(tmp_path, change):
    own = write_result(tmp_path, record())
    newest = tmp_path / "eval" / "knn.json"
    assert read_results(tmp_path).newest["knn"]["results"] == record()["results"]
    newest.write_text(change(newest.read_text()))
    found = read_results(tmp_path)
    # The same measurement is still there under its own name.
    assert found.newest["knn"]["results"] == record()["results"] and len(found.all) == 1
    assert "Not shown: eval/knn.json, changed or damaged" in "\n".join(evaluation.notes(reported(tmp_path, found)))
    own.write_text(change(own.read_text()))
    found = read_results(tmp_path)
    assert not found.newest and not found.all and len(found.refused) == 2
    run = reported(tmp_path, found)
    assert "90" not in evaluation.section_of([run]) and "Not measured yet" in verdict.section_of([run])


def test_the_newest_is_the_last_measured_where_its_file_is_lost(tmp_path):
    for day, test in ((2, "b"), (3, "a"), (1, "c")):
        write_result(tmp_path, record(day / 10, test=test, measured=f"2026-01-0{day}"))
    assert read_results(tmp_path).newest["knn"]["measured"] == "2026-01-01"
    (tmp_path / "eval" / "knn.json").unlink()
    found = read_results(Path(tmp_path))
    assert found.newest["knn"]["measured"] == "2026-01-03" and len(found.all) == 3


def test_measurements_that_differ_in_a_setting_alone_are_told_apart(tmp_path):
    for size in (28, 24):
        write_result(tmp_path, record(size / 100, size=size))
    write_result(tmp_path, record(0.7, protocol="linear"))
    page = evaluation.section_of([reported(tmp_path, read_results(tmp_path))])
    assert "kNN, k = 5, size 28<" in page and "kNN, k = 5, size 24<" in page and ">linear<" in page
    assert "raw pixels" not in page  # nothing was measured of them


def test_what_settings_were_chosen_on_is_said_by_the_result_alone(tmp_path):
    write_result(tmp_path, record(protocol="finetune") | {"chosen_on": "nothing; the rate is given"})
    write_result(tmp_path, record(protocol="linear") | {"chosen_on": "a tenth of the training images"})
    write_result(tmp_path, record())
    page = evaluation.section_of([reported(tmp_path, read_results(tmp_path))])
    on = "3 test images of test, 9 labelled training images of test, checkpoint of step 4"
    assert f"finetune: {on}; settings chosen on: nothing; the rate is given." in page
    assert f"linear: {on}; settings chosen on: a tenth of the training images." in page
    assert f"kNN: {on}." in page and "probe" not in page and "Frozen" not in page


def test_a_protocol_that_trains_on_nothing_names_no_training_images(tmp_path):
    write_result(tmp_path, record(protocol="retrieval") | {"num_train": 0})
    page = evaluation.section_of([reported(tmp_path, read_results(tmp_path))])
    assert "retrieval: 3 test images of test, checkpoint of step 4." in page and "training images of" not in page
    assert re.search(r"<td[^>]*>test</td>\s*<td[^>]*></td>\s*<td[^>]*>4", page)


def test_notes_say_what_does_better_in_a_sentence(tmp_path):
    results = {name: {"top1": share} for name, share in (("pretrained", 0.25), ("centre", 0.5), ("chance", 0.75))}
    write_result(tmp_path, record(protocol="sound-localisation") | {"results": results})
    said = evaluation.notes(reported(tmp_path, read_results(tmp_path)))
    for what in ("the centre of each picture does", "chance does"):
        assert f"sound-localisation: {what} better than the pretrained network." in said


def test_only_shares_are_shown_in_percent(tmp_path):
    spectrum = {"effective_rank": 0.5, "mean_share": 0.25, "alpha": 0.75, "uniformity": -0.5, "num_images": 1}
    by_share = {"0.01": {"top1": 0.5, "num_train": 9}, "0.1": {"top1": 0.625, "num_train": 90}}
    measured = {
        "spectrum": {"metric": "effective_rank", "metric_is_share": False, "results": {"pretrained": spectrum}},
        "clusters": {"results": {"pretrained": {"nmi": 0.5, "ari": -0.125, "by_prototype": {"nmi": 0.375}}}},
        "linear": {"results": {"pretrained": {"top1": 0.5, "learning_rate": 0.25}}},
        "own-task": {"metric": "task_accuracy", "results": {"pretrained": {"task_accuracy": 0.875, "loss": 0.35}}},
        "low-shot": {
            "metric": "top1",
            "metric_title": "top-1",
            "results": {"pretrained": {"top1": 0.5, "by_share": by_share}},
        },
    }
    for protocol, about in measured.items():
        write_result(tmp_path, record(protocol=protocol) | about)
    page = evaluation.section_of([reported(tmp_path, read_results(tmp_path))])
    shown = re.sub(r"<[^>]*>", " ", page).replace("  ", " ")
    for line in ("effective rank 0.5", "mean share 25.00 %", "alpha 0.75", "uniformity -0.5", "num images 1"):
        assert re.search(rf"{line}\s", shown), (line, shown)
    for line in (
        "ari -12.50 %",
        "by prototype .* nmi 37.50 %",
        "learning rate 0.25",
        "loss 0.35",
        "share = 0.1 .* top1 62.50 %",
    ):
        assert re.search(rf"{line}\s", shown), (line, shown)
    printed = table(["run"], [record(protocol="low-shot") | measured["low-shot"]])
    assert re.search(r"^10% of the labels +62.50%$", printed, re.MULTILINE)
