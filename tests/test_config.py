"""Covers: largescale/config/loading.py, largescale/config/merging.py"""

from __future__ import annotations

import pickle
import tempfile

import pytest

from largescale.cli import main
from largescale.config import Config, flatten, load_config, to_yaml
from largescale.config.slots import schema_for
from largescale.methods import METHODS
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.methods import those_with

RELIED_ON = """
    name run.dir run.seed run.log_every data.shards data.eval_shards data.audit data.workers data.crops
    model.backbone model.stem model.prototypes method.name method.temperature method.epsilon
    method.sinkhorn_iterations optim.name optim.lr train.epochs train.steps train.global_batch train.precision
    parallel.strategy checkpoint.every_steps checkpoint.keep
"""

OF_FSDP_AS_ELSEWHERE = "parallel.unit_min_parameters=2000000"
"""The small recipe sets it for the tests that choose fsdp; under ddp that is said to have no effect."""


def test_keys_that_others_rely_on_exist():
    schema = schema_for("swav")
    assert set(RELIED_ON.split()) <= {*flatten(schema(name="x")), *schema(name="x").method.moved}


@pytest.mark.parametrize("old", ["model.prototypes=30", "model.prototypes.1=30", "model={prototypes: 30, width: 8}"])
def test_keys_of_earlier_versions_work_by_their_old_names(old, tmp_path):
    config = load_config(ROOT / "tests/tiny.yaml", ["data.shards=x", old])
    assert config.method.prototypes in (30, [12, 30])
    (tmp_path / "old.yaml").write_text("name: x\ndata: {shards: x}\nmodel: {prototypes: 30, hidden: [64]}\n")
    config = load_config(tmp_path / "old.yaml")
    assert (config.method.prototypes, config.method.hidden) == (30, [64])
    with pytest.raises(InputError, match=r"model.prototypes is now called method.prototypes, which is set too"):
        (tmp_path / "both.yaml").write_text("name: x\nmodel: {prototypes: 30}\nmethod: {prototypes: 3}\n")
        load_config(tmp_path / "both.yaml")


def test_the_method_decides_which_keys_there_are(tmp_path):
    with pytest.raises(InputError, match=r"method.name=swaw: expected one of .*; did you mean swav"):
        load_config(ROOT / "tests/tiny.yaml", ["data.shards=x", "method.name=swaw"])
    small = ROOT / "configs/small/simclr.yaml"
    for override in ("method.queue=64", "method.queue.0=64", "method={queue: 64}"):
        with pytest.raises(
            InputError, match=f"^method.queue is unknown for method simclr; {those_with('queue')} have it$"
        ):
            load_config(small, [override])
    (tmp_path / "recipe.yaml").write_text(f"extends: {small}\nmethod: {{epsilon: 0.1}}\n")
    with pytest.raises(InputError, match=r"recipe.yaml: method.epsilon is unknown for method simclr; swav has it$"):
        load_config(tmp_path / "recipe.yaml")
    config = load_config(ROOT / "tests/tiny.yaml", ["data.shards=x"])
    assert pickle.loads(pickle.dumps(config)) == config


def test_later_layers_win(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ndata: {shards: a}\noptim: {lr: 1.0, momentum: 0.5}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/middle.yaml").write_text("extends: ../base.yaml\noptim: {lr: 2.0}\n")
    (tmp_path / "folder/top.yaml").write_text("extends: middle.yaml\nname: top\n")
    config = load_config(tmp_path / "folder/top.yaml", ["optim.lr=3.0", "optim.lr=4.0"])
    assert (config.name, config.data.shards, config.optim.momentum, config.optim.lr) == ("top", "a", 0.5, 4.0)
    assert config.run.dir == "runs/top"


@pytest.mark.parametrize(
    "overrides, epochs, steps",
    [
        (["train.epochs=3"], 3, 0),
        (["train.steps=0", "train.epochs=3"], 3, 0),
        (["train={epochs: 2}"], 2, 0),
        (["train.steps=3"], 100, 3),
        (["train.epochs=3", "train.steps=0"], 3, 0),
        ([], 100, 14),
    ],
)
def test_epochs_given_later_count_against_a_recipes_steps(overrides, epochs, steps):
    train = load_config(ROOT / "tests/tiny.yaml", ["data.shards=x", *overrides]).train
    assert (train.epochs, train.steps) == (epochs, steps)


def test_epochs_of_a_file_count_against_steps_of_the_one_it_extends(tmp_path):
    (tmp_path / "longer.yaml").write_text(f"extends: {ROOT}/tests/tiny.yaml\ntrain: {{epochs: 2}}\n")
    assert load_config(tmp_path / "longer.yaml", ["data.shards=x"]).train.steps == 0


def test_epochs_and_steps_in_one_command_are_refused():
    with pytest.raises(InputError, match=r"train.epochs=1 train.steps=14: expected only one, since"):
        load_config(ROOT / "tests/tiny.yaml", ["data.shards=x", "train.steps=14", "train.epochs=1"])


def test_written_and_read_again_it_is_the_same():
    config = load_config(ROOT / "tests/tiny.yaml", ["data.shards=x"])
    assert load_config_text(to_yaml(config)) == config


def load_config_text(text: str) -> Config:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load_config(file.name)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("extends: self.yaml\nname: x\n", "extends itself"),
        ("extends: nothing.yaml\n", "no such configuration file"),
        ("- a\n- b\n", "expected a mapping"),
        ("name: [\n", "not readable as YAML"),
        ("name: x\ndata: {shards: y}\noptim: {lr: fast}\n", "optim.lr"),
        ("name: x\ndata: {shards: y}\ntrain: {global_batch: 0}\n", "train.global_batch=0: expected at least 1"),
        ("name: x\n", "data.shards is not set"),
        ("name: !!python/object/apply:os.system ['true']\n", "not readable as YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, text, expected):
    (tmp_path / "self.yaml").write_text(text)
    with pytest.raises(InputError, match=expected):
        load_config(tmp_path / "self.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_is_valid(path):
    config = load_config(path, ["data.shards=somewhere"])
    assert config.method.name == next(
        (name for name in (path.stem, path.stem.rpartition("_")[0], path.parent.name) if name in METHODS), "swav"
    )


@pytest.mark.parametrize(
    "override, expected",
    [
        ("data.shards=[{path: a, weight: .inf}]", "expected finite numbers"),
        ("data.shards=[{path: a, weight: true}]", "expected a folder or URL, or a list"),
        ("data.shards=[{path: a, weight: 0}]", "expected a folder or URL, or a list"),
        ("data.shards=[a, {path: ./a, weight: 3}]", "each folder once, or with a different subset each time"),
        ("data.shards=[{path: s3://a/, subset: x}, {path: s3://a, subset: x}]", "s3://a: expected each folder once"),
        ("data.cache_gb=.inf", "data.cache_gb=inf: expected finite numbers"),
        ("data.store_stall_s=.inf", "data.store_stall_s=inf: expected finite numbers"),
        ("run.hang_timeout_s=.inf", "run.hang_timeout_s=inf: expected finite numbers"),
        ("run.hang_timeout_s=1e300", "run.hang_timeout_s=1e+300: expected at most 1e+06"),
        ("optim.lr=.nan", "optim.lr=nan: expected finite numbers"),
        ("data.crops=[{num: 2, ratio: [1, .inf]}]", "expected finite numbers"),
        ("data.augment.blur_sigma=[1]", "data.augment.blur_sigma=[1.0]: expected [smallest, largest], above 0"),
        ("data.augment.blur_sigma=[0, 1]", "data.augment.blur_sigma"),
        ("data.augment.erase_side=[0.5, 0.2]", "data.augment.erase_side"),
        ("data.augment.flip=1.5", "data.augment.flip=1.5: expected a probability from 0 to 1"),
        ("data.augment.noise=-1", "data.augment.noise=-1.0: expected 0 or more"),
        ("data.std=[0,0,0]", "data.std=[0.0, 0.0, 0.0]: expected three numbers above 0"),
        ("model.depths=[]", "model.depths=[]: expected blocks per stage"),
        ("parallel.replicate=2", "parallel.replicate=2: expected 1 with parallel.strategy=ddp"),
    ],
)
def test_values_out_of_range_are_refused_by_key(override, expected):
    with pytest.raises(InputError) as error:
        load_config(ROOT / "tests/tiny.yaml", ["data.shards=x", override])
    assert expected in str(error.value)


def test_a_folder_may_come_twice_with_subsets_of_its_own():
    twice = "data.shards=[{path: a, subset: x, weight: 2}, {path: a, subset: y}]"
    assert load_config(ROOT / "tests/tiny.yaml", [twice]).data.shards[1]["subset"] == "y"


def test_print_says_what_does_not_fit(tiny_overrides, capsys):
    late = tiny_overrides("method.freeze_prototypes_steps=99", "optim.warmup_epochs=9", OF_FSDP_AS_ELSEWHERE)
    assert main(["pretrain", str(ROOT / "tests/tiny.yaml"), *late, "--print"]) == 0
    warmup, frozen = capsys.readouterr().err.splitlines()
    assert warmup.startswith("warning: optim.warmup_epochs=9 is 108 of the run's 14 steps")
    assert frozen.startswith("warning: method.freeze_prototypes_steps=99: prototypes train from step 99 on")


def test_print_shows_what_follows_from_a_configuration(tiny_overrides, capsys, tmp_path):
    assert main(["pretrain", str(ROOT / "tests/tiny.yaml"), *tiny_overrides(OF_FSDP_AS_ELSEWHERE), "--print"]) == 0
    text, complaints = capsys.readouterr()
    assert complaints == ""
    for fact in (
        "# samples: 200",
        "# global batch: 16",
        "# steps: 14",
        "# samples left out per epoch: 8",
        "# views per image: 2 x 28 px + 1 x 20 px + 1 x 16 px",
        "# feature width: 16",
        "# warm-up: 2 steps, from 0 to 0.5",
        "# prototypes train: from step 2 of 14",
    ):
        assert fact in text
    assert not (tmp_path / "run").exists()
    assert load_config_text(text).optim.lr == 0.5
