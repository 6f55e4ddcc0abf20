"""A second home for checkpoints: any store that fsspec knows (s3://, gs://, abfs://, sftp://, a second disk).

What is published in the run's folder is copied there, every rank its part of the files and `progress.json` last, which
makes the copy whole. A run whose folder has nothing newer fetches from there before it continues.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
from pathlib import Path

from largescale.checkpoint.folder import PROGRESS, newest_first, open_checkpoint
from shards.errors import InputError

_log = logging.getLogger(__name__)


class Mirror:
    """The copies of a run's checkpoints.

    Args:
        url: folder in a store; its credentials come from the environment, as the store's library documents.

    Raises:
        InputError: a scheme that fsspec does not know, or whose library is not installed.
    """

    def __init__(self, url: str) -> None:
        # Imported late: most runs have no mirror.
        import fsspec

        self.url = url
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"checkpoint.mirror={url}: {error}") from error
        self._root = root.rstrip("/")

    def steps(self) -> list[int]:
        """Steps of the whole copies, newest first."""
        self._fs.invalidate_cache()
        marks = self._fs.glob(f"{self._root}/step-*/{PROGRESS}")
        return sorted((int(mark.split("/")[-2].removeprefix("step-")) for mark in marks), reverse=True)

    def copy_files(self, checkpoint: Path, part: int, parts: int) -> None:
        """Copy this part of a published checkpoint's files."""
        names = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        target = f"{self._root}/{checkpoint.name}"
        self._fs.makedirs(target, exist_ok=True)
        for name in names[part::parts]:
            self._fs.put_file(str(checkpoint / name), f"{target}/{name}")

    def complete(self, checkpoint: Path) -> None:
        """Make a copy whole whose files are all there, and remove copies of what the run's folder does not keep."""
        self._fs.pipe_file(f"{self._root}/{checkpoint.name}/{PROGRESS}", (checkpoint / PROGRESS).read_bytes())
        kept = {kept.step for kept in newest_first(checkpoint.parent)}
        for step in self.steps():
            if step not in kept and step < max(kept):
                folder = f"{self._root}/step-{step:08d}"
                self._fs.rm_file(f"{folder}/{PROGRESS}")
                self._fs.rm(folder, recursive=True)

    def fetch_newer(self, folder: Path) -> None:
        """Bring the newest copy to the run's folder, unless that has it or something newer. By one process.

        Raises:
            InputError: the store cannot be reached, the copy lists a file outside of its folder or is not one of ours.
        """
        try:
            steps, here = self.steps(), newest_first(folder)
        except Exception as error:  # every store's library has errors of its own
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise InputError(f"checkpoint.mirror={self.url}: cannot be listed ({what}); check the URL, the network and "
                             f"the credentials") from error
        if not steps or (here and here[0].step >= steps[0]):
            return
        name = f"step-{steps[0]:08d}"
        _log.info("fetching %s from %s", name, self.url)
        temporary = folder / f".{name}.{socket.gethostname()}.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        mark = self._fs.cat_file(f"{self._root}/{name}/{PROGRESS}")
        for file in _names(mark, f"{self.url}/{name}"):
            self._fs.get_file(f"{self._root}/{name}/{file}", str(temporary / file))
        (temporary / PROGRESS).write_bytes(mark)
        checkpoint = open_checkpoint(temporary)
        damage = checkpoint.damage() if checkpoint else f"{PROGRESS} cannot be read"
        if damage:
            shutil.rmtree(temporary)
            raise InputError(f"{self.url}/{name}: {damage}; remove that copy, or checkpoint.mirror, and try again")
        os.replace(temporary, folder / name)


def _names(mark: bytes, where: str) -> list[str]:
    try:
        names = list(json.loads(mark)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: {PROGRESS} cannot be read; remove that copy") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{where}: {PROGRESS} lists {name!r}, which is no file of a checkpoint; remove that copy")
    return names
