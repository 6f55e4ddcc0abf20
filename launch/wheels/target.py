"""The Python and the platform that wheels are gathered for, in the words that pip and packaging use."""

from __future__ import annotations

import platform
import re
import sys
from dataclasses import dataclass

from packaging.markers import default_environment

from shards.ground.errors import InputError

NEWEST_GLIBC = 28
"""Minor version of the glibc 2 that wheels may need: torch's own wheels need it, so a machine that has torch has it."""
LEGACY = {"manylinux2014": 17, "manylinux2010": 12, "manylinux1": 5}
"""Older names of manylinux_2_NN tags, with their NN."""


@dataclass(frozen=True)
class Target:
    """CPython `python` (3.12 or 3.12.4) on `platform` (linux_x86_64, or manylinux_2_17_x86_64 for an older glibc)."""

    python: str
    platform: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"3\.\d+(\.\d+)?", self.python):
            raise InputError(f"PYTHON_VERSION={self.python}: expected a version such as 3.12")
        if not re.fullmatch(r"(linux|manylinux_2_\d+)_(x86_64|aarch64)", self.platform):
            raise InputError(f"PLATFORM={self.platform}: expected linux_x86_64, linux_aarch64 or manylinux_2_NN_x86_64")

    def __str__(self) -> str:
        return f"Python {self.python} on {self.platform}"

    @property
    def machine(self) -> str:
        """The processor, as `uname -m` prints it."""
        return "aarch64" if self.platform.endswith("aarch64") else "x86_64"

    @property
    def minor(self) -> str:
        """The Python version without its patch level."""
        return ".".join(self.python.split(".")[:2])

    @property
    def is_here(self) -> bool:
        """Whether code that is compiled here, for the Python running this, runs there."""
        here = (f"{sys.version_info.major}.{sys.version_info.minor}", sys.platform, platform.machine())
        return here == (self.minor, "linux", self.machine)

    def tags(self) -> list[str]:
        """Every platform tag that fits; pip compares them word for word."""
        glibc = re.match(r"manylinux_2_(\d+)", self.platform)
        newest = int(glibc[1]) if glibc else NEWEST_GLIBC
        names = [f"manylinux_2_{minor}" for minor in range(newest, 4, -1)]
        names += [name for name, minor in LEGACY.items() if minor <= newest]
        if self.is_here:
            names.append("linux")  # what was compiled from source a moment ago
        return [f"{name}_{self.machine}" for name in names]

    def markers(self) -> dict[str, str]:
        """The environment to evaluate a requirement's marker in; an unknown patch level counts as 0."""
        full = self.python if self.python != self.minor else f"{self.minor}.0"
        return {
            **default_environment(),
            "python_version": self.minor,
            "python_full_version": full,
            "implementation_version": full,
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "os_name": "posix",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": self.machine,
        }
