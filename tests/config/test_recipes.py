"""Recipes are found by name wherever the command is given, and a file at the path given always wins."""

from __future__ import annotations

import pytest

from largescale.cli import main
from largescale.config import Config, load_config
from largescale.config.recipes import find_recipe, packaged
from largescale.data.length import Length
from largescale.methods import METHODS, Method
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

NAME = "swav/resnet50_800ep"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_packaged_recipes_are_those_of_the_repository():
    files = sorted(path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
    assert [f"{name}.yaml" for name in packaged()] == files
    for name in packaged():
        assert find_recipe(name).read_bytes() == (ROOT / "configs" / f"{name}.yaml").read_bytes()


def spoilt(config: Config) -> list[str]:
    """What is said of augmentation that gives the task away or hides it."""
    return Method.complaints.__func__(METHODS[config.method.name], config, Length(8, 2, 40))  # type: ignore[attr-defined]


def test_no_recipe_switches_on_what_spoils_its_task():
    assert {name: found for name in packaged() if (found := spoilt(load_config(name, ["data.shards=x"])))} == {}


@pytest.mark.parametrize("name", ["jigsaw", "patches", "cpc", "artifacts", "context_encoder", "denoising"])
def test_what_spoils_a_task_is_said(name):
    found = spoilt(load_config(f"small/{name}", ["data.augment.erase=0.5"]))
    assert [line.split(":")[0] for line in found] == ["data.augment.erase=0.5"]


@pytest.mark.parametrize("given", [NAME, f"{NAME}.yaml", f"configs/{NAME}.yaml", f"configs/{NAME}"])
def test_a_name_means_the_packaged_recipe(given):
    assert load_config(given, ["data.shards=x"]) == load_config(ROOT / f"configs/{NAME}.yaml", ["data.shards=x"])


def test_a_file_there_wins(tmp_path):
    (tmp_path / "swav").mkdir()
    (tmp_path / f"{NAME}.yaml").write_text("name: mine\ndata: {shards: x}\n")
    assert load_config(f"{NAME}.yaml").name == "mine"


def test_a_recipe_of_ones_own_can_extend_a_packaged_one(tmp_path):
    (tmp_path / "mine.yaml").write_text(f"extends: {NAME}\nname: mine\ndata: {{shards: x}}\n")
    config = load_config("mine.yaml")
    assert (config.name, config.train.epochs) == ("mine", 800)
    (tmp_path / "wrong.yaml").write_text("extends: swav/nothing\nname: mine\n")
    with pytest.raises(InputError, match=r"wrong.yaml: extends=swav/nothing: no such configuration file beside it"):
        load_config("wrong.yaml")


def test_commands_take_the_name_of_a_recipe(capsys):
    assert main(["pretrain", NAME, "data.shards=nothing"]) == 2
    assert "error: nothing: no such folder" in capsys.readouterr().err
    assert main(["config", "train.epochs", NAME]) == main(["config", "optim", "demo"]) == 0
    assert "value    800" in capsys.readouterr().out
    assert main(["status", "demo", "run.dir=mine"]) == 85
    assert capsys.readouterr().out.startswith("mine: not started")


@pytest.mark.parametrize(
    "inside, expected",
    [
        ("manifest.json", "{}: holds shards, not a recipe; write one for them: `largescale init {} > my.yaml`"),
        ("config.yaml", "{}: is the folder of a run; pass its recipe, {}/config.yaml"),
        ("image.jpg", "{}: is a folder; pass the file of a recipe, or the name of one that comes with the package"),
    ],
)
def test_a_folder_in_place_of_a_recipe_says_what_to_pass(tmp_path, inside, expected):
    (tmp_path / inside).write_text("")
    with pytest.raises(InputError) as error:
        load_config(tmp_path)
    assert str(error.value) == expected.format(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("swav/resnet50_800", "no recipe of this name; did you mean swav/resnet50_800ep?"),
        ("zzzzz", f"no recipe of this name; there are {packaged()[0]}, "),
    ],
)
def test_what_is_neither_names_what_there_is(given, expected):
    with pytest.raises(InputError) as error:
        load_config(given)
    assert expected in str(error.value) and str(error.value).startswith(f"{given}: no such configuration file")


PUBLISHED = [
    ("paws/resnet50_100ep", lambda config: config.data.crops[1].augment, {}),
    ("pirl/resnet50_800ep", lambda config: config.parallel.sync_batchnorm, False),
    ("pirl/resnet50_200ep", lambda config: config.parallel.sync_batchnorm, False),
    ("rotation/resnet50_105ep", lambda config: config.optim.exclude_bias_and_norm, True),
    ("rotation/alexnet_50ep", lambda config: config.optim.exclude_bias_and_norm, False),
    ("deepcluster/resnet50_200ep", lambda config: config.model.sobel, True),
    ("deepcluster/alexnet_500ep", lambda config: config.model.sobel, True),
    ("odc/resnet50_440ep", lambda config: config.data.augment.rotate_degrees, 2),
    ("odc/resnet50_440ep", lambda config: config.data.crops[0].scale, [0.08, 1]),
    ("odc/resnet50_440ep", lambda config: (config.data.augment.saturation, config.data.augment.hue), (1, 0.5)),
    ("pretext/jigsaw", lambda config: config.data.augment.grayscale, 0.66),
    ("pretext/jigsaw", lambda config: (config.optim.warmup_lr, config.optim.warmup_epochs), (0.025, 5)),
]
"""What recipes have of published configurations: suncet's src/data_manager.py, VISSL's configs/config/pretrain,
MMSelfSup's configs/selfsup."""


@pytest.mark.parametrize("name, setting, value", PUBLISHED)
def test_recipes_have_the_values_of_published_configurations(name, setting, value):
    assert setting(load_config(name, ["data.shards=x"])) == value
