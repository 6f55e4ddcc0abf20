"""Headers of tar members are tarfile's, to the byte."""

from __future__ import annotations

import io
import tarfile

from hypothesis import example, given
from hypothesis import strategies as st

from shards.format.writer import header


def theirs(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode, member.uname, member.gname = size, 0, 0o444, "bigdata", "bigdata"
    return member.tobuf(tarfile.PAX_FORMAT)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=130), st.integers(0, 2**36))
@example("a" * 100, 8**11 - 1)
@example("a" * 101, 8**11)
@example("ä.jpg", 0)
def test_a_header_is_that_of_tarfile(name, size):
    assert header(name, size) == theirs(name, size)


def test_tarfile_reads_it():
    whole = header("folder/key.jpg", 5) + b"12345" + bytes(507) + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        [member] = tar.getmembers()
        assert (member.name, member.size, member.mode) == ("folder/key.jpg", 5, 0o444)
        assert tar.extractfile(member).read() == b"12345"
