"""What a run depends on besides its configuration."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision

from largescale.processes import world_size


def environment() -> dict[str, Any]:
    """Versions, git revision, devices and the command, for environment.json."""
    cuda = torch.cuda.is_available()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "git_revision": _git_revision(),
        "machine": platform.platform(),
        "processor": _processor(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else ["cpu"],
        "cpu_cores": os.cpu_count(),
        "threads_a_rank": torch.get_num_threads(),
        "world_size": world_size(),
    }


def _git_revision() -> str:
    """Of the repository that this file is tracked in: an environment may lie inside somebody else's."""
    here = Path(__file__)
    git = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True, check=False)
    try:
        tracked = git(["git", "ls-files", "--error-unmatch", here.name]).returncode == 0
        revision = git(["git", "describe", "--always", "--dirty", "--abbrev=40"]).stdout.strip() if tracked else ""
    except OSError as error:  # there may be no git
        return f"unknown ({error.strerror}: git)"
    return revision or "not a git checkout"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
