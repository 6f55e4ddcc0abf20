"""Every key of every method is there, with a help text, and each group says what it is about.

Covers: largescale/config/model_settings.py, largescale/config/schema.py, largescale/config/values.py
"""

from __future__ import annotations

import pytest

from largescale.config import load_config
from largescale.config.checks import settings_of
from largescale.config.data_settings import CropGroup
from largescale.config.reference import every_key, groups
from largescale.config.values import written
from largescale.methods import METHODS
from tests.helpers.commands import ROOT


@pytest.mark.parametrize("method", METHODS)
def test_every_key_that_a_run_has_is_among_them(method):
    config = load_config(ROOT / f"configs/small/{method}.yaml")
    known = {key.name for key in every_key() if key.method in ("", method)}
    for name, _, _ in settings_of(config):
        assert name.replace("[1]", "[0]").replace("[2]", "[0]") in known


@pytest.mark.parametrize("key", every_key(), ids=lambda key: f"{key.method}-{key.name}")
def test_every_key_has_a_help_text(key):
    text = key.setting.help
    assert len(text.split()) >= 2 and text.endswith(".") and text[0] == text[0].upper()


def test_every_group_says_what_it_is_about():
    for group, about in groups().items():
        assert about.endswith(".") and "(" not in about, f"the class of {group} has no docstring"


@pytest.mark.parametrize(
    "value, expected",
    [
        (True, "true"),
        ("", "''"),
        (1e-6, "1e-06"),
        (600.0, "600"),
        ([0.75, 4 / 3], "[0.75, 1.33333]"),
        (3000, "3000"),
        (CropGroup(num=1, size=8), "{num: 1, size: 8, scale: [0.14, 1], ratio: [0.75, 1.33333], augment: {}}"),
        ([{"path": "a", "weight": 1.0}], "[{path: a, weight: 1}]"),
    ],
)
def test_values_are_written_as_in_a_recipe(value, expected):
    assert written(value) == expected
