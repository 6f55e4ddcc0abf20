"""Finds, builds and downloads the wheels that a project needs, with pip.

Three things pip leaves to us. For another Python it takes no source packages: those are built first, and the result
serves any Python if it is pure. It evaluates markers for the Python that it runs under: dependencies that hold on the
target alone are found in the wheels' metadata and asked for in another round. And it cannot be told that torch is there
already: empty stand-ins take its place while it resolves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from launch.wheels.target import Target
from shards.ground.errors import InputError

STAND_IN = "+stand.in"
"""How the versions of stand-ins end, so that pip takes nothing else for them."""
NO_COMPILED_OPS = {"DS_BUILD_OPS": "0", "BUILD_CUDA_EXTENSIONS": "0"}
"""DeepSpeed and FairScale build as pure Python, without torch; operators are compiled where they are used."""


def pip(command: str, *arguments: object) -> None:
    """Run pip, naming each package that it downloads. Raises InputError with pip's last error."""
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, *map(str, arguments)]
    with (
        tempfile.TemporaryFile("w+") as words_of_error,
        subprocess.Popen(
            words, env={**os.environ, **NO_COMPILED_OPS}, text=True, stdout=subprocess.PIPE, stderr=words_of_error
        ) as process,
    ):
        for line in process.stdout:
            fetched = re.match(r"\s*(?:Downloading|Processing|Using cached) (\S+\.whl)(?!\S)", line)
            if fetched and STAND_IN not in fetched[1]:
                print(f"  {Path(fetched[1]).name}", flush=True)
        process.wait()
        words_of_error.seek(0)
        said = words_of_error.read()
    if process.returncode:
        errors = re.findall(r"^ERROR: (.*)", said, re.MULTILINE)
        if not errors or not errors[-1].startswith("No matching distribution"):
            print(said, file=sys.stderr)  # a compiler's words, or those of a conflict
        raise InputError(errors[-1] if errors else f"pip {command} failed, see above")


def metadata(wheel: Path) -> Message:
    """The fields of a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return Parser().parsestr(archive.read(name).decode())


def requirements(wheel: Path) -> list[Requirement]:
    """What a wheel requires, with markers."""
    return [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]


def by_name(folder: Path) -> dict[str, Path]:
    """The wheels of a folder. Raises InputError if there are two of a package."""
    wheels: dict[str, Path] = {}
    for path in sorted(folder.glob("*.whl")):
        other = wheels.setdefault(parse_wheel_filename(path.name)[0], path)
        if other != path:
            raise InputError(f"{folder}: two wheels of one package, {other.name} and {path.name}")
    return wheels


def write_stand_in(requirement: Requirement, folder: Path) -> str:
    """Write an empty wheel that satisfies the requirement; returns the constraint that lets pip take no other."""
    version = next(bound.version for bound in requirement.specifier if bound.operator == ">=") + STAND_IN
    info = f"{requirement.name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{requirement.name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{requirement.name}=={version}"


def build_sources(wanted: list[Requirement], sources: list[object], target: Target, out: Path) -> list[str]:
    """Build what pip finds no wheel of into `out`; returns the names of those that run on this machine only."""
    report = out / "report.json"
    pip(
        "install",
        "--quiet",
        "--dry-run",
        "--ignore-installed",
        "--prefer-binary",
        "--report",
        report,
        *sources,
        *wanted,
    )
    foreign = []
    for item in json.loads(report.read_text())["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if item["download_info"]["url"].endswith(".whl"):
            continue
        print(f"building {name} {version} from its source", flush=True)
        # Past pip's cache, where a build with compiled operators may lie.
        pip("wheel", "--quiet", "--no-deps", "--no-cache-dir", "--wheel-dir", out / name, f"{name}=={version}")
        [wheel] = (out / name).glob("*.whl")
        if target.is_here or all(tag.platform == "any" for tag in parse_wheel_filename(wheel.name)[3]):
            shutil.move(wheel, out)
        else:
            foreign.append(name)
    return foreign


def closure(wheels: dict[str, Path], wanted: list[Requirement], target: Target) -> tuple[set[str], list[Requirement]]:
    """Names of the wheels that `wanted` comes down to on the target, and the requirements that no wheel satisfies."""
    needed: set[tuple[str, str]] = set()
    missing = []
    queue = list(wanted)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        version = parse_wheel_filename(wheels[name].name)[1] if name in wheels else None
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(requirement)
            continue
        for extra in {"", *requirement.extras} - {extra for known, extra in needed if known == name}:
            needed.add((name, extra))
            for dependency in requirements(wheels[name]):
                if dependency.marker is None or dependency.marker.evaluate({**target.markers(), "extra": extra}):
                    dependency.marker = None
                    queue.append(dependency)
    return {name for name, _ in needed}, missing


def download(wanted: list[Requirement], sources: list[object], target: Target, work: Path, out: Path) -> None:
    """Fill `out` with the target's wheels for `wanted` and all that it comes down to, and no others.

    `sources` are options that tell pip where to look; one of them names `work`, where wheels built from source go.
    """
    tags = [word for tag in target.tags() for word in ("--platform", tag)]
    missing = wanted
    while missing:
        foreign = build_sources(wanted, sources, target, work)
        shutil.rmtree(out, ignore_errors=True)
        try:
            pip(
                "download",
                "--only-binary=:all:",
                "--python-version",
                target.python,
                *tags,
                *sources,
                "--dest",
                out,
                *wanted,
            )
        except InputError as error:
            compiled = f" (only as source with compiled code: {', '.join(foreign)})" if foreign else ""
            raise InputError(
                f"{error}{compiled}, for {target}: run make wheels with that Python on such a machine "
                "(PYTHON=python3.NN), or leave out what needs it (EXTRAS=...)"
            ) from error
        wheels = by_name(out)
        needed, missing = closure(wheels, wanted, target)
        wanted = wanted + missing
    for name in wheels.keys() - needed:
        wheels[name].unlink()
