"""Cases that go wrong in every way there is, and one that does not."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def fine(report: Any, context: Any) -> None:
    report.row("a number", figure=0.5)
    report.judge("a truth", True, "not shown")


def raises(report: Any, context: Any) -> None:
    report.row("what came before")
    raise ValueError("a wrong\nvalue")


def aborts(report: Any, context: Any) -> None:
    report.row("what came before")
    os.abort()


def killed(report: Any, context: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(report: Any, context: Any) -> None:
    """With a process of its own, which a killed case must not leave behind, and deaf to polite signals."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(context.kept, "child").write_text(str(child.pid))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    report.row("what came before")
    time.sleep(600)


def lacks_a_library(report: Any, context: Any) -> None:
    importlib.import_module("no_such_library.part")


def silent(report: Any, context: Any) -> None:
    pass
