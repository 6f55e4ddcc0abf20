"""Several labels per image, or none: lists in a `json` or `cls` member of each sample.

json:labels    {"labels": ["dog", "person"]}    a field of the json member, a list of names or numbers
cls            3,7  or  ["dog", "person"]       a JSON list, or names or numbers between commas or in lines; the class
                                                as it is where classes are folders or were given names
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from largescale.data.corpora import Corpus
from largescale.evaluate.members import MemberReader
from largescale.processes import on_rank_0, rank
from shards.ground.errors import InputError

Labels = frozenset[str]


class LabelLists:
    """The lists of the samples of a corpus; each source is read once."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._known: dict[tuple[str, tuple[int, ...]], list[Labels | None]] = {}

    def read(self, source: str, ids: Tensor) -> list[Labels | None]:
        """The labels of samples, None for those without the member.

        Args:
            source: `json:FIELD` or `cls`.
            ids: of the samples, int64 [N].

        Raises:
            InputError: another source, or a member that is not as it must be; names the sample.

        Collectives: every rank must call it; a broadcast of an object, the first time.
        """
        wanted = source, tuple(ids.tolist())
        if wanted not in self._known:
            self._known[wanted] = on_rank_0(lambda: self._read(source, wanted[1]))
        return self._known[wanted]

    def require(self, source: str, key: str) -> None:
        """Refuse a source without a label; looks at samples until one has some, so costs nothing where all is well.

        Args:
            source: `json:FIELD` or `cls`.
            key: of the setting that names it.

        Raises:
            InputError: on all ranks.

        Collectives: every rank must call it; one broadcast of an object.
        """

        def look() -> None:
            samples = range(self._corpus.manifest.num_samples)
            if any(self._each(source, samples)):
                return
            hint = f"; they have classes, which {key}=cls takes" if self._corpus.manifest.classes else ""
            raise InputError(
                f"{key}={source}: none of the {len(samples):,} images of {self._corpus.manifest.name} has a label there"
                + (hint or "; name another member")
            )

        on_rank_0(look)

    def _read(self, source: str, ids: Sequence[int]) -> list[Labels | None]:
        said = f"labels of {self._corpus.manifest.name}"
        bar = tqdm(ids, desc=said, unit="image", leave=False, mininterval=1, disable=rank() > 0)
        return list(self._each(source, bar))

    def _each(self, source: str, ids: Iterable[int]) -> Iterator[Labels | None]:
        member, colon, field = source.partition(":")
        if member not in ("json", "cls") or bool(colon) != (member == "json") or (colon and not field):
            raise InputError(f"labels from {source!r}: expected json:FIELD, such as json:labels, or cls")
        members, settings = MemberReader(self._corpus, member), self._corpus.manifest.settings
        # Names may have commas, as ImageNet's do.
        are_names = settings.get("labels") == "folder" or bool(settings.get("class_names"))
        for number in ids:
            try:
                if field:
                    payload = members.read(number)
                    yield None if payload is None else _of_json(payload, field)
                else:
                    label = members.reader.label(number)
                    text = "" if label < 0 else self._corpus.manifest.classes[label]
                    yield None if label < 0 else frozenset([text]) if are_names else _of_text(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{members.name(number)}: {source}: {error}") from error


def _of_json(payload: bytes, field: str) -> Labels | None:
    try:
        content = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(content, dict) or field not in content or content[field] is None:
        return None
    return _checked(content[field])


def _of_text(text: str) -> Labels:
    if text.startswith("["):
        return _checked(json.loads(text))
    return frozenset(word.strip() for word in re.split(r"[,\n]", text) if word.strip())


def _checked(value: Any) -> Labels:
    if not isinstance(value, list) or not all(type(one) is int or (isinstance(one, str) and one) for one in value):
        raise ValueError(f"expected a list of names or numbers, got {json.dumps(value)[:60]}")
    return frozenset(map(str, value))


def sorted_classes(lists: Sequence[Labels | None]) -> list[str]:
    """All labels that occur: numbers by value, names by letters."""
    found = {label for labels in lists if labels is not None for label in labels}
    return sorted(found, key=lambda label: (0, int(label), label) if label.isdecimal() else (1, 0, label))
