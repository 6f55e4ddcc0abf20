"""Archives as sources: a zip, tars.

Names inside them are only ever keys: nothing is extracted, and a member never becomes a path.
"""

from __future__ import annotations

import json
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

from shards.format.keys import FreshKeys
from shards.format.tar import HELD_SAMPLES, ONE_MORE, ScatteredTar, TarSample, TornTar, walk
from shards.ground.errors import InputError
from shards.images.names import NO_IMAGE, is_image, suffix_of, why_no_image
from shards.sources.found import SCATTERED, TORN, Content, Found, first_folder, left_out, why_beside
from shards.stores.folders import Entry, Folder

MAX_MEMBER_BYTES = 2**30
"""A member of a zip that says it unpacks to more is left out: it would fill the memory."""

_Reasons = list[tuple[str, str]]
"""Names of members that are left out, and why."""

_BESIDE_TARS = ("plan", "holdout", "_tmp")
"""Folders beside tars that we, or img2dataset, make."""

_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError)


class ZipSource:
    """Members of a zip archive, by name. A place is a member's name; of several with one name, the second and later
    have a number behind a zero byte, which no name holds.
    """

    kind = "zip"

    def __init__(self, folder: Folder, name: str) -> None:
        self.location, self._folder, self._name = f"{folder.location}/{name}", folder, name
        self._open: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}

    def list(self) -> Iterator[Found]:
        """See `Source`."""
        files: dict[str, FreshKeys] = {}
        names: dict[str, FreshKeys] = {}
        key_folders = {"": ""}
        self._archive()
        for place, member in sorted(self._members.items()):
            reason = why_beside(member.filename) or why_no_image(member.filename, partial(self._begin, place))
            if reason:
                yield left_out(place, reason)
                continue
            if member.file_size > MAX_MEMBER_BYTES:
                yield left_out(place, f"unpacks to more than {MAX_MEMBER_BYTES:,} bytes")
                continue
            folder, _, base = member.filename.rpartition("/")
            known = ""
            for part in folder.split("/") if folder else ():
                inside = f"{known}{part}/"
                if inside not in key_folders:
                    own = names.setdefault(known, FreshKeys()).of_folder(part or "_")
                    key_folders[inside] = f"{key_folders[known]}{own}/"
                known = inside
            key = key_folders[known] + files.setdefault(known, FreshKeys()).of_file(base)
            yield Found(place, key, member.file_size, folder=first_folder(member.filename))

    def read(self, place: str) -> Content:
        """See `Source`."""
        self._archive()
        if place not in self._members:
            raise OSError(0, "not in the archive")
        # Never more than was said: the rest of one that lies is not unpacked.
        member = self._members[place]
        return Content(self._begin(place, member.file_size), suffix_of(member.filename))

    def _begin(self, place: str, size: int) -> bytes:
        """The first bytes of a member."""
        archive, member = self._archive(), self._members[place]
        if member.flag_bits & 1:
            raise OSError(0, "encrypted in the archive")
        try:
            with archive.open(member) as file:
                return file.read(size)
        except InputError:  # the store that the archive is in
            raise
        except NotImplementedError as error:
            raise OSError(0, "of an unknown compression in the archive") from error
        except _DAMAGED as error:
            raise OSError(0, "damaged in the archive") from error

    def name(self, place: str) -> str:
        """See `Source`."""
        return place.partition("\0")[0]

    def identity(self, place: str) -> str:
        """See `Source`."""
        return place

    def reads(self, place: str) -> int:
        """See `Source`. All come from one open file."""
        return 1

    def compare_with(self, places: Sequence[str]) -> None:
        """See `Source`: there is no other file."""

    def _archive(self) -> zipfile.ZipFile:
        if self._open is None:
            try:
                self._open = zipfile.ZipFile(self._folder.open(self._name))
            except InputError:
                raise
            except (*_DAMAGED, NotImplementedError, OSError) as error:
                raise InputError(f"{self.location}: not a whole zip archive ({error}); pack it again") from error
            self._members = _places(self._open)
        return self._open

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": None, "_members": {}}  # every process opens its own


def _places(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The files of an archive by place. Names may come twice: only the member itself says which is meant."""
    places: dict[str, zipfile.ZipInfo] = {}
    times: dict[str, int] = {}
    for member in archive.infolist():
        if member.is_dir():
            continue
        times[member.filename] = number = times.get(member.filename, 0) + 1
        places[member.filename if number == 1 else f"{member.filename}\0{number:06d}"] = member
    return places


def is_tar(entry: Entry) -> bool:
    """Whether what lies in a folder is a tar."""
    return not entry.is_folder and not entry.other and suffix_of(entry.name) == "tar"


def tars_beside(folder: Folder) -> list[Entry]:
    """The tars of a folder, and what lies beside them.

    Raises:
        InputError: not listable, or there are images beside them: which of them are meant is for the user to say.
    """
    entries = folder.entries()
    tar = next((entry.name for entry in entries if is_tar(entry)), "")
    for entry in entries if tar else ():
        is_known = entry.name in _BESIDE_TARS or entry.name.startswith(".")
        if (entry.is_folder and not is_known) or (not entry.is_folder and is_image(entry.name)):
            what = f"the folder {entry.name}" if entry.is_folder else f"the image {entry.name}"
            raise InputError(
                f"{folder.location}: holds tars ({tar}) and also {what}; move one of them elsewhere, and convert "
                f"each separately"
            )
    return entries


def _why_beside(entry: Entry) -> str:
    return "a folder beside tars" if entry.is_folder else entry.other or NO_IMAGE


class TarSource:
    """Samples of tars, as WebDataset groups them; what comes with an image (json, txt) stays with it, a `cls` is its
    label. A place says in which tar which bytes are; keys begin with the tar's name: others repeat them between tars.
    """

    def __init__(self, folder: Folder, name: str = "") -> None:
        """`name`: of the one tar of the folder that is meant; empty for all of them."""
        self.location = f"{folder.location}/{name}" if name else folder.location
        self.kind, self._folder, self._name = "tar" if name else "tars", folder, name

    def list(self) -> Iterator[Found]:
        """See `Source`. Of several tars a torn one is left out from the tear on, and listed; a scattered one as a
        whole: its first samples would lack members.
        """
        entries = [] if self._name else tars_beside(self._folder)
        for entry in entries:
            if not is_tar(entry):
                yield left_out(json.dumps({"tar": entry.name}), _why_beside(entry))
        names = [self._name] if self._name else [entry.name for entry in entries if is_tar(entry)]
        folders, is_alone = FreshKeys(), len(names) == 1
        for name in names:
            keys, key_folder = FreshKeys(), folders.of_folder(name.removesuffix(".tar"))
            skipped: list[tuple[str, str]] = []
            try:
                with self._open(name) as file:
                    for sample in self._samples(name, file, skipped, twice=not is_alone):
                        yield from self._found(name, sample, key_folder, keys, file)
            except TornTar:
                if is_alone:
                    raise
                yield left_out(json.dumps({"tar": name}), TORN)
            except ScatteredTar:
                if is_alone:
                    raise
                yield left_out(json.dumps({"tar": name}), SCATTERED)
                continue
            except OSError as error:
                text = f"{self._folder.location}/{name}: cannot be read ({error.strerror or error}); move it away"
                raise InputError(text) from error
            for member, reason in skipped:
                yield left_out(json.dumps({"tar": name, "member": member}), reason)

    def read(self, place: str) -> Content:
        """See `Source`."""
        where = json.loads(place)
        suffixes, spans = list(where["members"]), list(where["members"].values())
        members = dict(zip(suffixes, self._folder.read_spans(where["tar"], spans), strict=True))
        return Content(members.pop(where["image"]), where["image"].rpartition(".")[2], members)

    def name(self, place: str) -> str:
        """See `Source`."""
        where = json.loads(place)
        if "key" in where:
            return f"{where['tar']}:{where['key']}.{where['image']}"
        return f"{where['tar']}:{where['member']}" if "member" in where else where["tar"]

    def identity(self, place: str) -> str:
        """See `Source`: a rewritten tar has the same samples in other places."""
        return self.name(place)

    def reads(self, place: str) -> int:
        """See `Source`."""
        return self._folder.reads

    def compare_with(self, places: Sequence[str]) -> None:
        """See `Source`."""
        self._folder.compare_with(list(dict.fromkeys(json.loads(place)["tar"] for place in places)))

    def _samples(self, name: str, file: BinaryIO, skipped: _Reasons, *, twice: bool) -> Iterator[TarSample]:
        """The samples of a tar; with `twice` none of a scattered one: a tar of so many samples that this is not known
        before the first ones are to be given is walked twice.
        """
        where = f"{self._folder.location}/{name}"
        held: list[TarSample] = []
        samples = walk(file, where, skipped)
        try:
            for sample in samples:
                held.append(sample)
                if len(held) > HELD_SAMPLES:
                    break
        except TornTar:
            yield from held
            raise
        if twice and len(held) > HELD_SAMPLES:
            with suppress(TornTar), self._open(name) as again:
                for _ in walk(again, where):
                    pass
        yield from held
        yield from samples

    def _open(self, name: str) -> BinaryIO:
        try:
            return self._folder.open(name)
        except OSError as error:
            raise InputError(f"{self._folder.location}/{name}: cannot be opened ({error.strerror})") from error

    def _found(self, tar: str, sample: TarSample, key_folder: str, keys: FreshKeys, file: BinaryIO) -> Iterator[Found]:
        """A sample, and what of it is left out."""
        images = sample.images()
        reason = why_beside(sample.key) or ("" if images else NO_IMAGE)
        if reason:
            yield left_out(json.dumps({"tar": tar, "key": sample.key, "image": "*"}), reason)
            return
        image, *others = images
        kept = {
            suffix: span
            for suffix, span in sample.members.items()
            if suffix == image or (suffix != "cls" and suffix not in others)
        }
        place = json.dumps({"tar": tar, "key": sample.key, "image": image, "members": kept})
        label = _bytes_at(file, *sample.members.get("cls", (0, 0))).decode("utf-8", "replace").strip()
        key = f"{key_folder}/{keys.of_folder(sample.key)}"
        yield Found(place, key, sample.members[image][1], label, first_folder(sample.key))
        for other in others:
            yield left_out(json.dumps({"tar": tar, "key": sample.key, "image": other}), ONE_MORE)


def _bytes_at(file: Any, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)
