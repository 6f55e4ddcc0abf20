"""Files are whole or not there, whoever else writes them."""

from __future__ import annotations

import errno

import pytest

from shards.ground.files import atomic_write, names_in, naming
from tests.helpers.permissions import as_nobody


def test_two_writers_of_the_same_process_number_do_not_mix(tmp_path):
    """As two containers have them that share a folder; here it is one process twice."""
    path = tmp_path / "features"
    with atomic_write(path) as first:
        first.write(b"1" * 100)
        with atomic_write(path) as second:
            second.write(b"2" * 30)
        assert path.read_bytes() == b"2" * 30
        first.write(b"1" * 100)
    assert path.read_bytes() == b"1" * 200
    assert [file.name for file in tmp_path.iterdir()] == ["features"]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path, open_folder):
    open_folder.chmod(0o555)
    with as_nobody(), pytest.raises(PermissionError) as denied, atomic_write(open_folder / "page.html"):
        pass
    assert denied.value.filename == str(open_folder / "page.html")
    with pytest.raises(OSError) as full, atomic_write(tmp_path / "page.html"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "page.html") and list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError) as other, naming(tmp_path):
        (tmp_path / "nothing").read_bytes()
    assert other.value.filename == str(tmp_path / "nothing")


def test_a_folder_that_cannot_be_read_is_not_empty(open_folder):
    (open_folder / "b").touch()
    (open_folder / "a").touch()
    assert names_in(open_folder) == ["a", "b"] and names_in(open_folder / "no") == names_in(open_folder / "a") == []
    open_folder.chmod(0)
    with as_nobody(), pytest.raises(PermissionError):
        names_in(open_folder)
    open_folder.chmod(0o755)
