"""`make wheels`: what it asks pip for, what it refuses, and small folders built and installed for real."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch.wheels.__main__ import check, check_folder, gather, replace, write_listing
from launch.wheels.collect import by_name, closure, pip, write_stand_in
from launch.wheels.target import Target
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
ELSEWHERE = "3.12" if HERE != "3.12" else "3.13"


def write_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    tag: str = "py3-none-any",
    fields: str = "",
    requires: tuple[str, ...] = (),
) -> Path:
    info = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{fields}"
            + "".join(f"Requires-Dist: {one}\n" for one in requires),
        )
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def names(folder: Path) -> set[str]:
    return set(by_name(folder))


# -- The target --------------------------------------------------------------------------------------------------------


def test_every_tag_that_fits_is_named():
    tags = Target("3.12", "linux_aarch64").tags()
    assert tags[:2] == ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64"]
    assert {"manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= set(tags)
    assert "manylinux_2_29_aarch64" not in tags
    old = Target("3.12", "manylinux_2_12_x86_64").tags()
    assert {"manylinux_2_12_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"} <= set(old)
    assert not {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} & set(old)


def test_what_is_compiled_here_is_for_here_alone():
    machine = os.uname().machine
    assert f"linux_{machine}" in Target(HERE, f"linux_{machine}").tags()
    assert f"linux_{machine}" in Target(f"{HERE}.1", f"linux_{machine}").tags()
    assert f"linux_{machine}" not in Target(ELSEWHERE, f"linux_{machine}").tags()
    other = "aarch64" if machine == "x86_64" else "x86_64"
    assert not any(tag.startswith("linux") for tag in Target(HERE, f"linux_{other}").tags())


@pytest.mark.parametrize(
    "python, platform, expected",
    [
        ("3", "linux_x86_64", "PYTHON_VERSION=3: expected a version such as 3.12"),
        ("312", "linux_x86_64", "PYTHON_VERSION=312"),
        ("3.12", "linux", "PLATFORM=linux: expected linux_x86_64"),
        ("3.12", "win_amd64", "PLATFORM=win_amd64"),
    ],
)
def test_a_target_that_is_none(python, platform, expected):
    with pytest.raises(InputError, match=expected):
        Target(python, platform)


# -- What is needed ----------------------------------------------------------------------------------------------------


def test_the_closure_is_the_targets(tmp_path):
    write_wheel(
        tmp_path,
        "house",
        requires=(
            "wall[paint]>=1",
            f'old; python_version < "{ELSEWHERE}"',
            f'new; python_version >= "{ELSEWHERE}"',
            'drive; sys_platform == "win32"',
            'arm; platform_machine == "aarch64"',
            'garden; extra == "garden"',
        ),
    )
    write_wheel(tmp_path, "wall", requires=('Paint_Shop; extra == "paint"', "house"))  # a circle
    for name in ("paint_shop", "old", "stray"):
        write_wheel(tmp_path, name)
    wheels, wanted = by_name(tmp_path), [Requirement("house")]
    needed, missing = closure(wheels, wanted, Target(ELSEWHERE, "linux_x86_64"))
    assert needed == {"house", "wall", "paint-shop"}
    assert [str(one) for one in missing] == ["new"]
    _, missing = closure(wheels, wanted, Target(ELSEWHERE, "linux_aarch64"))
    assert {one.name for one in missing} == {"new", "arm"}
    _, missing = closure(wheels, [Requirement("house[garden]"), Requirement("wall>=2")], Target("3.11", "linux_x86_64"))
    assert {str(one) for one in missing} >= {"garden", "wall>=2"}


def test_one_version_of_a_package(tmp_path):
    write_wheel(tmp_path, "wall", "1.0")
    write_wheel(tmp_path, "wall", "2.0")
    with pytest.raises(InputError, match="two wheels of one package"):
        by_name(tmp_path)


def test_a_stand_in_satisfies_and_nothing_else_does(tmp_path):
    assert write_stand_in(Requirement("torch>=2.11"), tmp_path) == "torch==2.11+stand.in"
    needed, missing = closure(by_name(tmp_path), [Requirement("torch>=2.11")], Target("3.12", "linux_x86_64"))
    assert needed == {"torch"} and not missing


# -- Mistakes ----------------------------------------------------------------------------------------------------------


def test_extras_and_pythons_that_are_not_ours(tmp_path):
    own = write_wheel(tmp_path, "house", fields="Requires-Python: >=3.11\nProvides-Extra: garden\nProvides-Extra: s3\n")
    check(own, Target("3.12", "linux_x86_64"), ["garden"])
    with pytest.raises(InputError, match="EXTRAS: no extra gardn; there are garden, s3"):
        check(own, Target("3.12", "linux_x86_64"), ["gardn", "s3"])
    with pytest.raises(InputError, match=r"PYTHON_VERSION=3.10: expected >=3.11"):
        check(own, Target("3.10", "linux_x86_64"), [])


def test_other_peoples_folders_are_left_alone(tmp_path):
    check_folder(tmp_path / "new")
    check_folder(tmp_path)
    (tmp_path / "requirements.txt").write_text("numpy\n")
    with pytest.raises(InputError, match="holds something else"):
        check_folder(tmp_path)
    with pytest.raises(InputError, match="holds something else"):
        check_folder(tmp_path / "requirements.txt")
    write_listing(tmp_path, Target("3.12", "linux_x86_64"), [])
    check_folder(tmp_path)


def test_make_says_what_it_wants():
    result = subprocess.run(["make", "wheels"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("make wheels DIR=FOLDER")


def test_pips_error_is_one_line(tmp_path, capsys):
    with pytest.raises(InputError, match=r"^No matching distribution found for no-such-wall$"):
        pip("download", "--no-index", "--find-links", tmp_path, "--dest", tmp_path, "no-such-wall")
    assert capsys.readouterr().err == ""


# -- The folder --------------------------------------------------------------------------------------------------------


def test_the_list_names_every_wheel_with_its_hash(tmp_path):
    wheel = write_wheel(tmp_path, "paint_shop", "1.2")
    write_listing(tmp_path, Target("3.12", "linux_x86_64"), ["s3", "http"])
    title, how, *lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert title.startswith("# Wheels of largescale[s3,http] for Python 3.12 on linux_x86_64")
    assert how.startswith("#   pip install --no-index")
    assert lines == [f"paint-shop==1.2 --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"]


def test_an_earlier_folder_gives_way_as_a_whole(tmp_path):
    for folder, name in (("wheels", "old"), ("wheels.partial", "new"), ("wheels.earlier", "older")):
        (tmp_path / folder).mkdir()
        write_wheel(tmp_path / folder, name)
    replace(tmp_path / "wheels", tmp_path / "wheels.partial")
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"] and names(tmp_path / "wheels") == {"new"}


def test_make_installs_from_wheels_alone():
    shown = subprocess.run(
        ["make", "--dry-run", "--always-make", "pretrain", "WHEELS=/some/wheels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.replace("\\\n", "")
    installs = [line for line in shown.splitlines() if "pip install" in line]
    assert installs and all("--no-index --find-links '/some/wheels'" in line for line in installs)
    assert "-m venv --system-site-packages" in shown
    assert "bin/torchrun" not in shown  # torch's own script runs torch's Python, which does not see the packages


def test_what_builds_the_project_comes_along():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert [Requirement(one).name for one in settings["build-system"]["requires"]] == ["setuptools"]


# -- For real, with packages from a shelf instead of an index ----------------------------------------------------------


def write_source(folder: Path, name: str, setup: str) -> None:
    """A source distribution of one module."""
    project = folder / f"{name}-1.0"
    project.mkdir(parents=True)
    (project / f"{name}.py").write_text("")
    (project / "code.c").write_text("#include <Python.h>\nPyMODINIT_FUNC PyInit_code(void) { return NULL; }\n")
    (project / "setup.py").write_text(
        "from setuptools import Extension, setup\n"
        f"setup(name='{name}', version='1.0', py_modules=['{name}'], {setup})\n"
    )
    (project / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as archive:
        archive.add(project, project.name)


@pytest.fixture
def shelf(tmp_path, monkeypatch) -> Path:
    """A folder where pip finds packages, and nowhere else; sources are built with this environment's setuptools."""
    shelf = tmp_path / "shelf"
    markers = [f'later; python_version >= "{ELSEWHERE}"', f'sooner; python_version < "{ELSEWHERE}"']
    write_source(shelf, "pure", f"install_requires={markers}")
    write_source(shelf, "compiled", "ext_modules=[Extension('code', ['code.c'])]")
    for name in ("later", "sooner", "setuptools"):
        write_wheel(shelf, name, "80.0")
    for version in (HERE, ELSEWHERE):
        cpython = f"cp{version.replace('.', '')}"
        write_wheel(shelf, "bricks", tag=f"{cpython}-{cpython}-manylinux_2_17_{os.uname().machine}")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "false")
    return shelf


def write_project(folder: Path, *requires: str) -> Path:
    """A project that needs torch, with what an earlier build left in its checkout."""
    for path, text in (
        ("house/__init__.py", ""),
        ("build/lib/house/stale.py", ""),
        (
            "pyproject.toml",
            f"""
        [build-system]
        requires = ["setuptools>=77"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "house"
        version = "1.0"
        requires-python = ">=3.11"
        dependencies = {["torch>=2.11", *requires]}
        [project.optional-dependencies]
        wall = ["bricks>=1"]
        [tool.setuptools.packages.find]
        include = ["house*"]
        """,
        ),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def python(venv: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a venv's Python without this machine's settings of pip."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        [venv / "bin" / "python", *map(str, arguments)],
        cwd=venv,
        capture_output=True,
        text=True,
        env={**environment, "PIP_CONFIG_FILE": os.devnull},
        check=False,
    )


@pytest.mark.slow
def test_a_folder_for_this_python_installs_without_an_index(tmp_path, shelf, capfd):
    project, folder = write_project(tmp_path / "project", "pure"), tmp_path / "wheels"
    target = Target(HERE, f"linux_{os.uname().machine}")
    gather(folder, target, ["wall"], project=project)
    assert "building pure 1.0 from its source" in capfd.readouterr().out
    expected = {"house", "pure", "later" if HERE >= ELSEWHERE else "sooner", "bricks", "setuptools"}
    assert names(folder) == expected
    with zipfile.ZipFile(by_name(folder)["house"]) as archive:
        assert "house/__init__.py" in archive.namelist() and "house/stale.py" not in archive.namelist()
    gather(folder, target, ["wall"], project=project)
    assert "building" not in capfd.readouterr().out and names(folder) == expected
    assert not {*tmp_path.glob("wheels*")} - {folder}

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = ("-m", "pip", "install", "--quiet", "--no-index", "--find-links")
    refused = python(venv, *install, folder, "house[wall]")
    assert refused.returncode != 0 and "torch>=2.11" in refused.stderr
    write_wheel(shelf, "torch", "2.11.0+cu130")  # the cluster's own
    python(venv, *install, shelf, "torch").check_returncode()
    python(venv, *install, folder, "house[wall]").check_returncode()
    python(venv, "-c", "import house, pure, bricks").check_returncode()
    exact = python(venv, *install, folder, "--force-reinstall", "--no-deps", "-r", folder / "requirements.txt")
    assert exact.returncode == 0, exact.stderr


@pytest.mark.slow
def test_a_folder_for_another_python(tmp_path, shelf):
    target, folder = Target(ELSEWHERE, f"linux_{os.uname().machine}"), tmp_path / "wheels"
    gather(folder, target, ["wall"], project=write_project(tmp_path / "project", "pure"))
    assert names(folder) == {"house", "pure", "later", "bricks", "setuptools"}
    assert f"cp{ELSEWHERE.replace('.', '')}" in by_name(folder)["bricks"].name
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as refused:
        gather(folder, target, [], project=write_project(tmp_path / "other", "compiled"))
    assert "only as source with compiled code: compiled" in str(refused.value)
    assert f"for {target}: run make wheels with that Python" in str(refused.value)
    assert sorted(folder.iterdir()) == before  # what was there is still there
    assert not {*tmp_path.glob("wheels*")} - {folder}
