"""A file that a store refuses, among others that it gives, is left out; a store that refuses all is not read on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from shards.conversion.convert import Options, convert
from shards.ground.errors import InputError
from shards.stores import store as store_module
from shards.stores.folders import NO_ANSWER, StoreFolder
from shards.stores.store import Forbidden, Refused
from shards.stores.store_errors import is_denied
from tests.helpers.images import image_bytes
from tests.helpers.servers import WebServer, web_server

pytestmark = pytest.mark.slow


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    for number in range(12):
        path = tmp_path / "served" / "pile" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(seed=number))
    with web_server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.Store.__init__, "__kwdefaults__", {"patience_s": 0.0, "stall_s": 60.0})


def refuse(web: WebServer, status: int, which: Callable[[str], bool]) -> list[str]:
    """Have a server refuse some files; returns a list that gets the names of those that were asked for."""
    give, asked = WebServer.answer, []

    def answer(request: SimpleHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2]
        if not which(name):
            give(web, request)
            return
        asked.append(name)
        request.send_error(status)

    web.answer = answer
    return asked


def is_image(name: str) -> bool:
    return name.endswith(".png")


@pytest.mark.parametrize("status, reason", [(403, "Permission denied"), (500, NO_ANSWER)])
@pytest.mark.parametrize("duplicates", ["keep", "exact"])
def test_a_file_that_is_refused_is_left_out(web, impatient, tmp_path, status, reason, duplicates):
    refuse(web, status, lambda name: name in ("00.png", "07.png"))
    options = Options("out", samples_per_shard=3, workers=2, duplicates=duplicates)
    manifest = convert(f"{web.url}/pile", tmp_path / "out", options)
    assert manifest.num_samples == 10 and manifest.skipped == {f"cannot be read: {reason}": 2}


def test_so_it_is_where_a_list_names_it(web, tmp_path):
    refuse(web, 403, lambda name: name == "00.png")
    rows = ["path", *(f"{web.url}/pile/{number:02d}.png" for number in range(12))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    manifest = convert(tmp_path / "list.csv", tmp_path / "out", Options("out"))
    assert manifest.num_samples == 11 and manifest.skipped == {"cannot be read: Permission denied": 1}


def test_where_all_are_denied_the_conversion_ends_at_once(web, tmp_path):
    asked = refuse(web, 403, is_image)
    with pytest.raises(InputError, match=r"0\d\.png: permission denied .*check the credentials"):
        convert(f"{web.url}/pile", tmp_path / "out", Options("out", samples_per_shard=1))
    assert set(asked) <= {f"{number:02d}.png" for number in range(12)} and len(asked) <= 1 + 2 * 8


def test_others_tell_a_refused_file_from_a_store_that_refuses_all(web):
    refuse(web, 403, lambda name: name == "00.png")
    folder = StoreFolder(f"{web.url}/pile")
    with pytest.raises(Forbidden, match="check the credentials"):
        folder.read("00.png")  # nothing else is known of the store
    folder.compare_with(["gone.png", "00.png", "01.png"])
    with pytest.raises(PermissionError):
        folder.read("00.png")
    with folder.open("00.png") as file, pytest.raises(PermissionError):
        file.read()
    assert folder.read("02.png") == image_bytes(seed=2)
    refuse(web, 403, is_image)  # as when credentials end
    with pytest.raises(Forbidden, match=r"03\.png: permission denied"):
        folder.read("03.png")


def test_a_file_without_an_answer_is_told_from_a_store_that_is_away(web, impatient):
    refuse(web, 503, lambda name: name == "00.png")
    folder = StoreFolder(f"{web.url}/pile")
    folder.compare_with(["00.png", "01.png"])
    with pytest.raises(OSError, match=NO_ANSWER) as raised:
        folder.read_spans("00.png", [(0, 3)])
    assert raised.value.errno == 0
    web.close()
    with pytest.raises(Refused, match="is the store up"):
        folder.read("02.png")


@pytest.mark.parametrize("status", [403, 503])
def test_a_file_is_asked_for_once_more_after_another_was_given(web, impatient, status):
    """Else what an outage, or a token that ends, refused shortly before it was over would be left out for ever."""
    refuse(web, status, is_image)
    refused, is_over = web.answer, []

    def answer(request: SimpleHTTPRequestHandler) -> None:
        if request.path.endswith("01.png"):
            is_over.append(True)
        (partial(WebServer.answer, web) if is_over else refused)(request)

    folder = StoreFolder(f"{web.url}/pile")
    web.answer = answer
    folder.compare_with(["00.png", "01.png"])
    assert folder.read("00.png") == image_bytes(seed=0)


def test_files_that_are_denied_by_themselves_cost_one_new_connection(web, monkeypatch):
    connect, connected = store_module.Store._connect, []
    monkeypatch.setattr(store_module.Store, "_connect", lambda self: (connected.append(self), connect(self))[1])
    refuse(web, 403, lambda name: name < "06.png")
    folder = StoreFolder(f"{web.url}/pile")
    folder.compare_with(["11.png"])
    for number in range(6):
        with pytest.raises(PermissionError):
            folder.read(f"{number:02d}.png")
    assert len(connected) == 2  # the first one, and one more


def test_what_the_libraries_of_stores_say_where_we_may_not_read():
    assert is_denied(PermissionError("Access Denied")) and is_denied(OSError("Forbidden: b/photos/o/a.png\nno access"))
    assert not is_denied(OSError(errno.EIO, "Forbidden: to read the disk")) and not is_denied(OSError("reset"))
