"""How threads wait is settled before torch is loaded.

Covers: largescale/__main__.py
"""

from __future__ import annotations

import os

import pytest

from tests.helpers.commands import run_python

SAYS = """
import os, sys
sys.argv = ["largescale", "--help"]
from largescale.__main__ import main
assert "torch" not in sys.modules
try:
    main()
except SystemExit:
    print("waits:", os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    "given, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_sleep_soon_unless_the_user_says_how_they_wait(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert run_python("-c", SAYS).stdout.splitlines()[-1] == f"waits: {expected}"
    assert os.environ.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")
