"""Folders of any number of keys, from real servers: each page of a listing is a request of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import pytest

from shards.stores import pages
from shards.stores import store as store_module
from shards.stores.pages import Page, page_of
from shards.stores.store import Missing, Store
from tests.helpers.servers import S3Server, s3_server

pytestmark = pytest.mark.slow

KEYS = ["a.png", "b.png", "b.png/c.png", "deep/er/d.png", "deep/e.png", "/f.png", "/deep//g.png", *"0123456789"]
BELOW = [
    *(("/deep//g.png", False, 1), ("/f.png", False, 1)),
    *((name, False, 1) for name in "0123456789"),
    *(("a.png", False, 1), ("b.png", False, 1), ("b.png", True, 0), ("deep", True, 0)),
]


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        client = server.client()
        for bucket in ("flat", "many", "bare"):
            client.mkdir(bucket)
        for key in KEYS:
            client.pipe_file(f"flat/{key}", b"x")
            client.pipe_file(f"many/below/{key}", b"x")
        client.call_s3("put_object", Bucket="many", Key="below/")  # as consoles make folders
        yield server


def test_pages_put_together_are_the_folder(s3, monkeypatch):
    for keys in (1, 2, 5, 1000):
        monkeypatch.setattr(pages, "PAGE_KEYS", keys)
        assert Store("s3://flat").entries() == BELOW
        assert Store("s3://many/below").entries() == Store("s3://many").entries("below") == BELOW
        assert Store("s3://many").entries() == [("below", True, 0)]
        assert Store("s3://many").entries("below/deep") == [("e.png", False, 1), ("er", True, 0)]
    assert Store("s3://bare").entries() == []
    for gone in ("s3://many/nothing", "s3://nothing"):
        with pytest.raises(Missing):
            Store(gone, patience_s=20).entries()


def test_the_limit_of_a_request_is_one_page_and_only_what_failed_is_asked_for_again(s3, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_KEYS", 4)
    asked, within = [], store_module.within

    def fails_once_in_a_while(seconds: float, request: Callable[[], Any]) -> Any:
        asked.append(seconds)
        if len(asked) in (2, 4):
            raise TimeoutError(f"nothing for {seconds:.0f} s")
        return within(seconds, request)

    monkeypatch.setattr(store_module, "within", fails_once_in_a_while)
    monkeypatch.setattr(store_module, "pause", lambda seconds: None)
    s3.client().mkdir("ten")
    for key in "0123456789":
        s3.client().pipe_file(f"ten/{key}", b"x")
    asked.clear()
    assert Store("s3://ten", stall_s=60).entries() == [(name, False, 1) for name in "0123456789"]
    assert asked == [60] * 5  # three pages, the second and the third of them twice


def test_a_store_that_lists_in_one_answer_may_take_as_long_as_it_is_waited_for(monkeypatch):
    asked = []

    def note(seconds: float, request: Callable[[], Any]) -> Any:
        asked.append(seconds)
        return request()

    monkeypatch.setattr(store_module, "within", note)
    fsspec.filesystem("memory").pipe_file("/listed/a.png", b"x")
    assert Store("memory://listed", patience_s=600, stall_s=60).entries() == [("a.png", False, 1)]
    assert asked == [600]


def test_pages_of_google_follow_each_other():
    class Google:
        """What its answers look like, by the reference of its JSON API: sizes are texts, empty lists are left out."""

        def call(self, method: str, path: str, bucket: str, *, json_out: bool, **asked: Any) -> dict[str, Any]:
            assert (method, path, bucket, json_out, asked["maxResults"]) == ("GET", "b/{}/o", "photos", True, 1000)
            if "pageToken" not in asked:
                assert asked == {"prefix": "raw/", "delimiter": "/", "maxResults": 1000}
                return {"prefixes": ["raw/deep/"], "nextPageToken": "more"}
            assert asked.pop("pageToken") == "more"
            return {"items": [{"name": "raw/a.png", "size": "17"}, {"name": "raw/b.png"}]}

    assert page_of(Google(), "photos", "raw/", "/", "") == Page([], ["raw/deep/"], "more")
    assert page_of(Google(), "photos", "raw/", "/", "more") == Page([("raw/a.png", 17), ("raw/b.png", 0)], [], "")
