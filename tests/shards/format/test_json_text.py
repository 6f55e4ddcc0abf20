from __future__ import annotations

import json

from shards.format.json_text import json_text


def test_text_stays_as_it_is_halves_of_characters_are_escaped_and_numbers_that_are_none_become_null():
    assert json_text({"a": "ä", "b": [1.5, float("nan")], 3: {"c": float("inf")}}) == (
        '{"a": "ä", "b": [1.5, null], "3": {"c": null}}'
    )
    text = json_text({"a": "ä\ud83d"})
    assert text.isascii() and json.loads(text) == {"a": "ä\ud83d"}
