from __future__ import annotations

import pytest

from largescale.config import load_config
from largescale.config.yaml_file import NotReadable, Written, parse
from shards.ground.errors import InputError


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a: 1\nb: 2\na: 3\n", "a appears twice, in lines 1 and 3"),
        ("g: {a: 1}\nh:\n  b: 1\n  c: 2\n  b: 3\n", "b appears twice, in lines 3 and 5"),
        ("g: {a: 1}\n'g': {b: 2}\n", "g appears twice, in lines 1 and 2"),
        ("- {num: 2, size: 3}\n- {num: 2, num: 3}\n", "num appears twice, in lines 2 and 2"),
        ("a: &a {x: 1}\nb: &b {y: 1}\nc: {<<: *a, <<: *b}\n", "<< appears twice, in lines 3 and 3"),
        ("a: &a {b: *a}\n", "line 1: an alias makes it contain itself"),
        ("a: &a [1, [*a]]\n", "line 1: an alias makes it contain itself"),
        ("? [1, 2]\n: 3\n", "line 1: a list or mapping cannot be a key"),
        ("a: !!set {x}\n", "only plain values"),
        ("a: !!binary aGk=\n", "only plain values"),
        ("a: !thing 3\n", "only plain values"),
        ("a: 1\n---\na: 2\n", "but found another document"),
        ("a: !!int x\n", "invalid literal"),
        ("a: " + 5000 * "1", "integer"),
        ("a: " + 3000 * "[", "nested too deeply"),
        ("a: *nothing\n", "undefined alias"),
    ],
)
def test_what_is_odd_is_refused_in_a_line(text, expected):
    with pytest.raises(NotReadable) as error:
        parse(text)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, value",
    [
        ("", None),
        ("a: 1e-3\nb: 2E5\nc: -1.5e3\nd: .5\n", {"a": 0.001, "b": 2e5, "c": -1500.0, "d": 0.5}),
        ("a: 2026-13-45\n", {"a": "2026-13-45"}),
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        (
            "a: &a {x: 1}\nb: &b {x: 2, z: 3}\nc: {<<: [*a, *b]}\n",
            {"a": {"x": 1}, "b": {"x": 2, "z": 3}, "c": {"x": 1, "z": 3}},
        ),
        ("a: &a [1, 2]\nb: [*a, *a]\n", {"a": [1, 2], "b": [[1, 2], [1, 2]]}),
        ("{a: true, b: null, c: text}", {"a": True, "b": None, "c": "text"}),
    ],
)
def test_what_is_plain_is_read(text, value):
    assert parse(text) == value


def test_numbers_are_kept_with_their_text():
    read = parse("a: 0012\nb: [1e3, yes, 1.50]\nc: null\nd: '7'\n", keep_text=True)
    assert read == {
        "a": Written(10, "0012"),
        "b": [Written(1000.0, "1e3"), Written(True, "yes"), Written(1.5, "1.50")],
        "c": None,
        "d": "7",
    }


def test_aliases_of_aliases_that_unfold_to_billions_are_refused():
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    with pytest.raises(NotReadable, match="line 16: aliases expand to more than 100000 values"):
        parse("\n".join(lines))


def test_a_group_that_stands_twice_in_a_recipe_names_file_and_lines(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\noptim: {lr: 1}\ndata: {shards: y}\noptim: {momentum: 0.5}\n")
    with pytest.raises(InputError, match=r"recipe\.yaml: not readable as YAML: optim appears twice, in lines 2 and 4"):
        load_config(recipe)


@pytest.mark.parametrize(
    "content", ["1: x", "null: x", "true: 1", "name: x\n3.5: {a: 1}", "extends: [a]", "extends: 3"]
)
def test_keys_that_are_no_text_are_refused(tmp_path, content):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(content)
    with pytest.raises(InputError, match=r"recipe\.yaml: (unknown key|extends=)"):
        load_config(recipe)
