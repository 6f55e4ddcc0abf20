"""Trees of classes: distances by hand, the same from names and from a file; what is no tree is refused in a line."""

from __future__ import annotations

import pytest
import torch

from largescale.evaluate.class_tree import class_relevance
from shards.ground.errors import InputError

PATHS = ["a/b/c", "a/b", "a/d", "e"]
BY_HAND = [[20, 19, 17, 16], [19, 20, 18, 17], [17, 18, 20, 17], [16, 17, 17, 20]]
"""From a/b/c: one edge to a/b, three to a/d by way of a, four to e by way of the root."""


def test_paths_are_a_tree():
    assert class_relevance(PATHS, "names").tolist() == BY_HAND


def test_a_file_is_a_tree(tmp_path):
    (tmp_path / "tree.tsv").write_text("c\tb\nb\ta\n\nd\ta\ne\troot\na\troot\n")
    assert class_relevance(["c", "b", "d", "e"], str(tmp_path / "tree.tsv")).tolist() == BY_HAND


def test_without_a_tree_a_class_is_relevant_to_itself_alone():
    assert torch.equal(class_relevance(PATHS, ""), torch.eye(4))


def test_what_is_very_far_is_not_relevant():
    assert class_relevance(["a/" * 15 + "b", "c/" * 15 + "d"], "names").tolist() == [[20, 0], [0, 20]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dog\n", r"line 1: expected a class, a tab and what it belongs to, got 'dog'"),
        ("dog\tpets\ndog\tanimals\n", r"line 2: dog belongs to pets already"),
        ("pets\tdog\ndog\tpets\n", r"'dog' belongs to itself, by way of 'pets'"),
        ("cat\tpets\n", r"lacks the class 'dog'; add a line for it"),
    ],
)
def test_what_is_no_tree_is_refused(tmp_path, text, said):
    (tmp_path / "tree.tsv").write_text(text)
    with pytest.raises(InputError, match=said):
        class_relevance(["dog"], str(tmp_path / "tree.tsv"))


def test_trees_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        class_relevance(["dog"], str(tmp_path / "none.tsv"))
    with pytest.raises(InputError, match="no name of a class is a path"):
        class_relevance(["dog"], "names")
    with pytest.raises(InputError, match="have no classes"):
        class_relevance([], "names")
