"""The recipes that come with the package: `configs/` of the repository, in an installed one too."""

from __future__ import annotations

from pathlib import Path

from largescale.config.setting import did_you_mean
from shards.ground.errors import InputError

_FOLDER = Path(__file__).parents[1] / "recipes"
_SUFFIX = ".yaml"


def find_recipe(given: str | Path) -> Path:
    """The file of a recipe: the one at this path, or else the packaged one that it names.

    Raises:
        InputError: there is neither; names the nearest.
    """
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if found := packaged_recipe(given):
        return found
    if path.is_dir():
        raise InputError(f"{given}: {_instead_of(path)}")
    near = did_you_mean(_name(given), packaged())
    raise InputError(
        f"{given}: no such configuration file, and no recipe of this name{near}"
        + ("" if near else f"; there are {', '.join(packaged())}")
    )


def _instead_of(folder: Path) -> str:
    """What to pass as a recipe in place of a folder."""
    if (folder / "manifest.json").is_file():
        return f"holds shards, not a recipe; write one for them: `largescale init {folder} > my.yaml`"
    if (folder / "config.yaml").is_file():
        return f"is the folder of a run; pass its recipe, {folder / 'config.yaml'}"
    return "is a folder; pass the file of a recipe, or the name of one that comes with the package"


def packaged_recipe(given: str | Path) -> Path | None:
    """The packaged recipe of a name: `swav/resnet50_800ep`, with or without `.yaml` behind and `configs/` before it."""
    return _FOLDER / f"{_name(given)}{_SUFFIX}" if _name(given) in packaged() else None


def packaged() -> list[str]:
    """The names of all packaged recipes."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.glob("**/*.yaml"))


def _name(given: str | Path) -> str:
    return Path(given).as_posix().removeprefix("configs/").removesuffix(_SUFFIX)
