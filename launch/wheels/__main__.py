"""Gathers everything but torch as wheels in one folder, for machines without internet.

    make wheels DIR=/tmp/wheels [PYTHON_VERSION=3.12] [PLATFORM=linux_aarch64] [EXTRAS=deepspeed,s3] [INCLUDE_TORCH=1]

docs/offline.md tells how to install from it.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename

from launch.wheels.collect import by_name, download, metadata, pip, requirements, write_stand_in
from launch.wheels.target import Target
from shards.ground.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
FROM_THE_CLUSTER = ("torch", "torchvision")
LISTING = "requirements.txt"
TITLE = "# Wheels of largescale"


def build_project(project: Path, settings: dict, out: Path) -> Path:
    """The project's own wheel, from a copy: in the checkout setuptools would pack what an earlier build left behind."""
    source = out / "source"
    source.mkdir()
    packages = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    for pattern in ("pyproject.toml", "README*", "LICENSE*", *packages):
        for path in project.glob(pattern):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, source / path.name)
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", out, source)
    return next(out.glob("*.whl"))


def check(own: Path, target: Target, extras: list[str]) -> None:
    """Raises InputError unless the project has these extras and runs on this Python."""
    fields = metadata(own)
    known = fields.get_all("Provides-Extra", [])
    if unknown := sorted(set(extras) - set(known)):
        raise InputError(f"EXTRAS: no extra {', '.join(unknown)}; there are {', '.join(known)}")
    if target.python not in SpecifierSet(fields["Requires-Python"]):
        raise InputError(f"PYTHON_VERSION={target.python}: expected {fields['Requires-Python']}")


def check_folder(folder: Path) -> None:
    """Raises InputError if the folder holds something that is not ours to replace."""
    if not folder.exists():
        return
    listing = folder / LISTING
    ours = listing.is_file() and listing.read_text().startswith(TITLE)
    if not ours and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"DIR={folder}: holds something else; give a new folder, or one that make wheels wrote")


def write_listing(folder: Path, target: Target, extras: list[str]) -> None:
    """Write requirements.txt: every wheel's name, version and sha256, in the form that pip installs from."""
    lines = [
        f"{TITLE}[{','.join(extras)}] for {target}. To install exactly these, torch being there:",
        "#   pip install --no-index --find-links FOLDER --no-deps -r FOLDER/requirements.txt",
    ]
    for name, wheel in by_name(folder).items():
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{name}=={parse_wheel_filename(wheel.name)[1]} --hash=sha256:{digest}")
    (folder / LISTING).write_text("\n".join(lines) + "\n")


def replace(folder: Path, partial: Path) -> None:
    """Give the finished folder its name; an earlier one goes away after that."""
    earlier = folder.with_name(f"{folder.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    partial.rename(folder)
    shutil.rmtree(earlier, ignore_errors=True)


def gather(folder: Path, target: Target, extras: list[str], include_torch: bool = False, project: Path = ROOT) -> None:
    """Fill `folder` with wheels and their list. What an earlier run put there stays until the new folder is whole."""
    check_folder(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)  # now, rather than minutes later, if it cannot be made
    try:
        with tempfile.TemporaryDirectory(prefix="wheels-") as work:
            fill(partial, folder, target, extras, () if include_torch else FROM_THE_CLUSTER, project, Path(work))
        write_listing(partial, target, extras)
        replace(folder, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fill(
    out: Path, earlier: Path, target: Target, extras: list[str], absent: tuple[str, ...], project: Path, work: Path
) -> None:
    """Put the wheels of the project and all it needs into `out`; those named in `absent` are left to the cluster."""
    settings = tomllib.loads((project / "pyproject.toml").read_text())
    own = build_project(project, settings, work)
    check(own, target, extras)
    constraints = work / "constraints.txt"
    constraints.write_text("\n".join(write_stand_in(one, work) for one in requirements(own) if one.name in absent))
    sources = ["--constraint", constraints, "--find-links", work]
    if earlier.exists():
        sources += ["--find-links", earlier]
    itself = Requirement(f"{metadata(own)['Name']}[{','.join(extras)}] @ {own.as_uri()}")
    print(f"gathering {itself.name}[{','.join(extras)}] for {target}", flush=True)
    download([itself, *map(Requirement, settings["build-system"]["requires"])], sources, target, work, out)
    for name, wheel in by_name(out).items():
        if name in absent:
            wheel.unlink()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.wheels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python-version", default=f"{sys.version_info.major}.{sys.version_info.minor}")
    parser.add_argument("--platform", default=f"linux_{platform.machine()}")
    parser.add_argument("--extras", default="deepspeed,fairscale,s3,http")
    parser.add_argument("--include-torch", action="store_true", help="take torch along, with all of CUDA")
    arguments = parser.parse_args()
    try:
        folder = arguments.folder.resolve()
        gather(
            folder,
            Target(arguments.python_version, arguments.platform),
            [extra for extra in arguments.extras.split(",") if extra],
            arguments.include_torch,
        )
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    wheels = by_name(folder)
    size = sum(path.stat().st_size for path in wheels.values()) / 1e6
    print(f"{folder}: {len(wheels)} wheels, {size:,.0f} MB, listed in {LISTING}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
