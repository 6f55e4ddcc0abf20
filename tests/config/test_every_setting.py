"""What holds for every setting of the schema, found by walking it: a new key is tested as soon as it is declared.

Covers: largescale/config/data_settings.py, largescale/config/names.py, largescale/config/setting.py,
largescale/config/slots.py, largescale/config/value_types.py
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from largescale.config import CropGroup, augment_of_group, load_config, to_yaml
from largescale.config.names import all_keys
from largescale.config.reference import every_key
from largescale.config.setting import declared
from largescale.config.slots import method_names, schema_for
from largescale.config.value_types import misfit_of_type, types_of
from largescale.config.yaml_file import NotReadable, parse
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

TINY = ROOT / "tests/tiny.yaml"
SMALL = ROOT / "configs/small"
SCHEMA = schema_for("swav")

HOSTILE = [
    "-1",
    "0",
    "1e400",
    ".nan",
    "-.inf",
    "''",
    "[]",
    "[0.9]",
    "{}",
    "123456789012345678901",
    "1" + 400 * "0",
    "true",
    "null",
    "[null]",
    "[[1]]",
    "{a: 3}",
    "${name",
    "${nothing}",
    "2026-13-45",
    "!!binary aGk=",
    "1e-300",
    "a\0b",
    "[1, 2, 3, 4]",
]


@pytest.mark.parametrize("place, key, method", [(place, key.name, key.method) for place, key in enumerate(every_key())])
def test_a_value_is_taken_or_refused_by_the_name_of_its_key(place, key, method):
    """Every value for every key would take minutes, so each key meets one and each value some keys."""
    value = HOSTILE[place % len(HOSTILE)]
    try:
        load_config(TINY if method in ("", "swav") else SMALL / f"{method}.yaml", ["data.shards=x", f"{key}={value}"])
    except InputError as error:
        message = str(error)
        # A value that fits may not fit another key, such as a queue its batch; then both are named.
        assert key.split("[")[0] in message or "not readable as YAML" in message, (value, message)
        assert "\n" not in message.strip(), value


def every_value(values: list[str]) -> list[Any]:
    read = []
    for text in values:
        with contextlib.suppress(NotReadable):
            read.append(parse(text))
    return read


def every_field(schema: type) -> list[Any]:
    hints = get_type_hints(schema)
    found = []
    for item in fields(schema):
        inner = next(iter(get_args(hints[item.name])), hints[item.name])
        if is_dataclass(inner):
            found += every_field(inner)
        if not is_dataclass(hints[item.name]):
            found.append((schema, item, hints[item.name]))
    return found


FIELDS = every_field(SCHEMA) + [
    field
    for method in method_names()
    if method != "swav"
    for field in every_field(types_of(schema_for(method))["method"])
]


@pytest.mark.parametrize("schema, item, hint", FIELDS, ids=lambda value: getattr(value, "name", ""))
def test_it_says_what_it_means_and_how_far_it_goes(schema, item, hint):
    setting = declared(item)
    assert setting.help.endswith(".") and len(setting.help) > 5
    if hint in (int, float, list[float], list[int]) and not item.name.endswith("_stages"):
        assert setting.at_least is not None or setting.above is not None, f"{item.name} has no lower bound"


@pytest.mark.parametrize("schema, item, hint", FIELDS, ids=lambda value: getattr(value, "name", ""))
def test_checking_any_value_of_any_type_says_something_or_nothing(schema, item, hint):
    for value in [*every_value(HOSTILE), b"x", 10**400, -(10**400), math.inf, [10**400], object()]:
        assert isinstance(misfit_of_type(value, hint), str)
        assert isinstance(declared(item).misfit(value), str)


def test_what_one_setting_needs_is_another():
    for method in method_names():
        schema = schema_for(method)
        for _, item, _ in every_field(schema):
            if used_if := declared(item).used_if:
                assert used_if.partition("=")[0] in all_keys(schema), (method, item.name)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("run.seed=-1", "run.seed=-1: expected 0 or more"),
        ("run.seed=123456789012345678901", "run.seed=123456789012345678901: expected a number of at most 64 bits"),
        ("optim.betas=[0.9]", "optim.betas=[0.9]: expected two numbers, each at least 0 and below 1"),
        ("optim.betas=[1.0, 1.0]", "optim.betas=[1.0, 1.0]: expected two numbers, each at least 0 and below 1"),
        ("optim.momentum=7", "optim.momentum=7.0: expected at least 0 and below 1"),
        ("optim.momentum=-1", "optim.momentum=-1.0"),
        ("optim.trust_coefficient=0", "optim.trust_coefficient=0.0: expected above 0"),
        ("optim.clip_grad_norm=-1", "optim.clip_grad_norm=-1.0: expected 0 or more"),
        ("method.temperature=0", "method.temperature=0.0: expected at least 1e-06"),
        ("evaluate.linear_batch=0", "evaluate.linear_batch=0: expected at least 1"),
        ("evaluate.linear_epochs=0", "evaluate.linear_epochs=0: expected at least 1"),
        ("evaluate.linear_rates=[]", "evaluate.linear_rates=[]: expected at least 1 value"),
        ("evaluate.linear_rates=[0.1, 0]", "evaluate.linear_rates=[0.1, 0.0]: expected values, each above 0"),
        ("evaluate.knn_neighbours=[0]", "evaluate.knn_neighbours=[0]: expected values, each at least 1"),
        ("evaluate.knn_temperature=-0.1", "evaluate.knn_temperature=-0.1"),
        ("evaluate.size=300", "evaluate.size=300: expected at most evaluate.resize=28"),
        ("method.prototypes={a: 3}", "method.prototypes={'a': 3}: expected a number above 1"),
        ("method.prototypes=[3, true]", "method.prototypes=[3, True]: expected a number above 1"),
        ("method.hidden=256", "method.hidden=256: expected a list of whole numbers"),
        ("data.crops={num: 2, size: 24}", "expected a list of {num, size, scale, ratio, augment}"),
        ("data.crops=[{num: 2, sized: 24}]", "unknown key data.crops[0].sized; did you mean data.crops[0].size?"),
        ("data.crops.0.augment.blur=2", "data.crops[0].augment.blur=2.0: expected a probability from 0 to 1"),
        ("data.crops.0.augment.blurr=1", "unknown key data.crops.0.augment.blurr; did you mean data.augment.blur?"),
        ("data.crops.0.augment={blurr: 1}", "data.crops.0.augment.blurr; did you mean data.augment.blur?"),
        ("data.crops.0.augment={blur: [1]}", "data.crops.0.augment.blur=[1]: expected a number"),
        (
            "data.crops.0.augment={blur_sigma: [2, 1]}",
            "data.crops[0].augment.blur_sigma=[2.0, 1.0]: expected [smallest,",
        ),
        ("data.crops=[{augment: {flip: -1}}]", "data.crops[0].augment.flip=-1.0: expected a probability from 0 to 1"),
        ("data.crops=[{augment: {flip: a}}]", "data.crops[0].augment.flip=a: expected a number"),
        ("data.crops=[{augment: {flip: null}}]", "data.crops[0].augment.flip=None: expected a number"),
        ("data.crops=[{augment: 3}]", "data.crops[0].augment=3: expected {KEY: value, ...}"),
        ("data.crops.0.augment=", "data.crops.0.augment=: expected {KEY: value, ...}"),
        ("data.crops.0.augment=${name}", "data.crops[0].augment"),
        ("data.crops.0.augment.blur=${name}", "data.crops[0].augment"),
        ("data.augment.solarise_threshold=2", "data.augment.solarise_threshold=2.0: expected at most 1"),
        ("data.crops.3.size=24", "data.crops has 3 elements"),
        ("data.crops.-1.size=24", "unknown key data.crops.-1.size"),
        ("optim.lr.0=1", "optim.lr is not a group of keys"),
        ("train.deterministic=5", "train.deterministic=5: expected true or false"),
        ("optim.lr=true", "optim.lr=True: expected a number"),
        ("optim.lr=", "optim.lr=: expected a number"),
        ("data.shards=null", "data.shards=None: expected a value, not null"),
        ("data.shards=[{path: null}]", "expected a folder or URL"),
        ("name=", "name=: expected a name"),
        ("model.depths=${name}", "model.depths=${name}: expected a list of whole numbers"),
        ("data.std=${run}", "data.std=${run}: expected a list of numbers"),
        ("data.crops[1].scale=${name}", "data.crops[1].scale=${name}: expected a list of numbers"),
        ("parallel.sharded_init=true", "parallel.sharded_init=True: expected false with parallel.strategy=ddp"),
        ("parallel.batchnorm_group_size=-1", "parallel.batchnorm_group_size=-1: expected 0 or more"),
        ("method.name=moco", "method.name=moco: expected one of swav"),
        ("parallel.strategy=zero9", "parallel.strategy=zero9: expected one of ddp, fsdp, zero1"),
        ("optim.name=adam", "optim.name=adam: expected one of lars, adamw, sgd"),
        ("model.backbone=resnet51", "model.backbone=resnet51: expected one of resnet, resnet50w2"),
        ("optim.owners=x", "unknown key optim.owners"),
        ("method.moved=x", "unknown key method.moved"),
        ("method.name=simclar", "; did you mean simclr?"),
        ("parallel.strategy=fdsp", "one of ddp, fsdp, zero1, zero2, zero3, fairscale; did you mean fsdp?"),
        ("optim.name=adam", "optim.name=adam: expected one of lars, adamw, sgd; did you mean adamw?"),
        ("model.backbone=resnet_50", "; did you mean resnet50?"),
        ("model.stem=imagnet", "model.stem=imagnet: expected imagenet, 3x3s2 or 3x3; did you mean imagenet?"),
        ("train.precision=bf-16", "expected auto, fp32, tf32, bf16, fp16 or fp64; did you mean bf16?"),
        ("train.batch=32", "unknown key train.batch; did you mean train.global_batch or evaluate.batch?"),
        ("data.shard=photos", "unknown key data.shard; did you mean data.shards?"),
        ("train.seed=32", "unknown key train.seed; did you mean run.seed?"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line_that_blames_the_override(override, expected):
    with pytest.raises(InputError) as error:
        load_config(TINY, ["data.shards=x", override])
    assert expected in str(error.value)
    assert "tiny.yaml" not in str(error.value)


@pytest.mark.parametrize(
    "override, read",
    [
        ("data.crops.0.size=24", lambda config: [group.size for group in config.data.crops] == [24, 20, 16]),
        ("data.crops[1].scale=[0.1, 0.2]", lambda config: config.data.crops[1].scale == [0.1, 0.2]),
        ("data.crops.2={num: 4}", lambda config: (config.data.crops[2].num, config.data.crops[2].size) == (4, 16)),
        ("data.crops=[{num: 3, size: 8}]", lambda config: config.data.crops == [CropGroup(num=3, size=8)]),
        (
            "data.crops.1.augment.blur=1",
            lambda config: [one.augment for one in config.data.crops][1:] == [{"blur": 1}, {}],
        ),
        ("data.crops.1.augment={blur: '0.5'}", lambda config: augment_of_group(config.data, 1).blur == 0.5),
        (
            "data.crops.1.augment=${data.augment}",
            lambda config: augment_of_group(config.data, 1) == config.data.augment,
        ),
        ("data.mean.1=0.25", lambda config: config.data.mean == [0.485, 0.25, 0.406]),
        ("method.prototypes.1=30", lambda config: config.method.prototypes == [12, 30]),
        ("optim.lr=1e-3", lambda config: config.optim.lr == 0.001),
        ("optim={lr: 2, momentum: 0.5}", lambda config: (config.optim.lr, config.optim.momentum) == (2, 0.5)),
        ("data.subset=", lambda config: config.data.subset == ""),
        ("name=007", lambda config: (config.name, config.run.dir) == ("007", "runs/007")),
        ("name=1e3", lambda config: config.name == "1e3"),
        ("name=2026-01-31", lambda config: config.name == "2026-01-31"),
        ("name= 0012  # the twelfth", lambda config: config.name == "0012"),
        ("name=no", lambda config: config.name == "no"),
        ("run={dir: 2024, seed: 0x10}", lambda config: (config.run.dir, config.run.seed) == ("2024", 16)),
        ("data.shards=2024", lambda config: config.data.shards == "2024"),
        ("data.shards=[2024, 007]", lambda config: config.data.shards == ["2024", "007"]),
        (
            "data.shards=[{path: 007, weight: 5e-1, subset: 1_0}, b]",
            lambda config: config.data.shards == [{"path": "007", "weight": 0.5, "subset": "1_0"}, "b"],
        ),
        ("method.prototypes=[12, 0x10]", lambda config: config.method.prototypes == [12, 16]),
        (
            "data.shards=[{path: a, weight: 1e-3}]",
            lambda config: config.data.shards == [{"path": "a", "weight": 0.001}],
        ),
    ],
)
def test_an_override_is_taken_as_it_is_meant(override, read):
    assert read(load_config(TINY, ["data.shards=x", override]))


@pytest.mark.parametrize(
    "text, read",
    [
        ("name: 0012", lambda config: (config.name, config.run.dir) == ("0012", "runs/0012")),
        ("name: 1e3", lambda config: config.name == "1e3"),
        ("name: 12:30", lambda config: config.name == "12:30"),
        ("name: yes", lambda config: config.name == "yes"),
        ("name: &day 0012\nrun: {seed: *day}", lambda config: (config.name, config.run.seed) == ("0012", 10)),
        ("run: {dir: 2024}", lambda config: config.run.dir == "2024"),
        ("data: {eval_shards: 1.50}", lambda config: config.data.eval_shards == "1.50"),
        (
            "method: {name: distillation, classes: [007, 1.0, on, tench]}",
            lambda config: config.method.classes == ["007", "1.0", "on", "tench"],
        ),
    ],
)
def test_text_that_looks_like_a_number_stays_as_it_is_written(text, read, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{text}\n" if text.startswith("name") else f"name: x\n{text}\n")
    config = load_config(tmp_path / "recipe.yaml", ["data.shards=2024"])
    assert read(config) and config.data.shards == "2024"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "key, word",
    [
        ("checkpoint.mirror", "false"),
        ("init_from", "no"),
        ("model.weights", "off"),
        ("model.mask", "False"),
        ("data.subset", "on"),
        ("data.cache", "FALSE"),
        ("data.eval_shards", "'no'"),
        ("evaluate.train_shards", "yes"),
    ],
)
def test_true_or_false_is_no_path(key, word, tmp_path):
    plain = word.strip("'")
    says = f"{key}={plain}: expected a path or URL, or '' for none; a folder or file of that name is ./{plain}"
    with pytest.raises(InputError) as refusal:
        load_config(TINY, ["data.shards=x", f"{key}={word}"])
    assert str(refusal.value) == says
    assert load_config(TINY, ["data.shards=x", f"{key}="]) == load_config(TINY, ["data.shards=x", f"{key}=''"])
    group, _, name = key.rpartition(".")
    (tmp_path / "recipe.yaml").write_text(f"name: x\n{group}: {{{name}: {word}}}\n" if group else f"{name}: {word}\n")
    with pytest.raises(InputError, match=re.escape(says)):
        load_config(tmp_path / "recipe.yaml", ["data.shards=x", "name=x"])


@pytest.mark.parametrize("text", ["name: null", "name: ~", "name:"])
def test_no_value_is_no_text(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{text}\n")
    with pytest.raises(InputError, match=r"recipe\.yaml: name=None: expected text"):
        load_config(tmp_path / "recipe.yaml", ["data.shards=x"])


def test_an_override_of_an_element_leaves_the_next_configuration_alone():
    load_config(TINY, ["data.shards=x", "data.crops.0.size=24", "data.mean.0=0.1"])
    config = load_config(TINY, ["data.shards=x"])
    assert (config.data.crops[0].size, config.data.mean[0]) == (28, 0.485)


def test_the_file_is_blamed_for_what_it_says(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"name": "x", "optim": {"lr": "fast"}}))
    with pytest.raises(InputError, match=r"recipe\.yaml: optim\.lr=fast: expected a number"):
        load_config(tmp_path / "recipe.yaml", ["data.shards=x"])
