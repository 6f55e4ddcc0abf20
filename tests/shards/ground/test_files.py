"""Files are whole or not there, whoever else writes them."""

from __future__ import annotations

from shards.ground.files import atomic_write


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
