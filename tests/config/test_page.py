"""docs/configuration.md is what the declarations say."""

from __future__ import annotations

from largescale.cli import main
from largescale.config.reference import every_key
from tests.helpers.commands import ROOT

COMMAND = "largescale config --markdown > docs/configuration.md"


def test_the_page_is_current(capsys):
    assert main(["config", "--markdown"]) == 0
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == capsys.readouterr().out, f"a setting was changed: run `{COMMAND}`"
    assert COMMAND in page


def test_every_key_has_a_row():
    rows = [line for line in (ROOT / "docs/configuration.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(every_key())
    for row in rows:
        assert row.replace("\\|", "").count("|") == 6, row
