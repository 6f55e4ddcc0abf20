"""Listings of object stores, page by page.

Their libraries list all of a prefix in one call, which takes a minute for some hundred thousand keys. A page takes well
under one, whatever the number of keys, and is all that has to be asked for again when it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

OBJECT_STORES = ("s3://", "s3a://", "gs://", "gcs://")
"""What URLs of stores begin with that hold keys, and list them by pages."""

PAGE_KEYS = 1000
"""Keys per page; S3 gives no more."""


class Page(NamedTuple):
    """A page of a listing.

    Attributes:
        files: keys, and bytes of each.
        folders: beginnings of further keys, up to the delimiter.
        next: what the next page is asked for by; empty: this is the last one.
    """

    files: list[tuple[str, int]]
    folders: list[str]
    next: str


def page_of(fs: Any, bucket: str, prefix: str, delimiter: str, after: str) -> Page:
    """One page of the keys that begin with a prefix.

    Args:
        fs: fsspec's file system of the store.
        bucket: holds the keys.
        prefix: what the keys begin with; empty for all.
        delimiter: keys that have it behind the prefix are given as folders; empty for none.
        after: `next` of the page before; empty for the first one.
    """
    ask: Callable[..., Page] = _page_of_s3 if hasattr(fs, "call_s3") else _page_of_gcs
    return ask(fs, bucket, prefix, delimiter, after)


def _page_of_s3(fs: Any, bucket: str, prefix: str, delimiter: str, after: str) -> Page:
    place = {"ContinuationToken": after} if after else {}
    answer = fs.call_s3(
        "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter=delimiter, MaxKeys=PAGE_KEYS, **place
    )
    return Page(
        [(entry["Key"], int(entry["Size"])) for entry in answer.get("Contents", [])],
        [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])],
        answer["NextContinuationToken"] if answer.get("IsTruncated") else "",
    )


def _page_of_gcs(fs: Any, bucket: str, prefix: str, delimiter: str, after: str) -> Page:
    asked = {"prefix": prefix, "delimiter": delimiter, "pageToken": after}
    answer = fs.call(
        "GET",
        "b/{}/o",
        bucket,
        json_out=True,
        maxResults=PAGE_KEYS,
        **{key: text for key, text in asked.items() if text},
    )
    return Page(
        [(entry["name"], int(entry.get("size", 0))) for entry in answer.get("items", [])],
        list(answer.get("prefixes", [])),
        answer.get("nextPageToken") or "",
    )
