"""Sound that goes with the image of a clip: a window of it, drawn on a grid of times and decoded from its FLAC file.

A frame is drawn among those that a window can overlap, then a window that overlaps it. Both are pure functions of
(seed, epoch, sample). Windows start at multiples of a grid from the clip's start, all of them: where one starts then
says nothing about which image it belongs to. With free starts a network reads it off traces that codecs leave at fixed
distances (arXiv 1712.06651, section 3.1).
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from largescale.config import SoundConfig
from largescale.data.clip_facts import ClipFacts
from largescale.data.corpora import Corpus
from largescale.data.random import uniform_at
from largescale.data.reader import SampleError, ShardReader
from shards.format.shard_index import read_index
from shards.ground.errors import InputError

_FRAME, _START, _LOUDNESS = 0, 1, 2
_PURPOSE = 5
"""Random numbers of this use are kept apart from those of others; three of them a sample."""


REMEDIES = {
    "has no sound": "list the clips that have sound in data.subset, or raise data.max_skipped_in_row",
    "no window of": "lower method.sound.seconds, or list clips with more sound in data.subset",
    "samples per second, not": "set method.sound.rate to that, or convert again with --sound-rate",
}
"""What to do by why a clip cannot be heard."""


class Heard(NamedTuple):
    """What is heard with a sample.

    Attributes:
        frame: number of the frame that is seen with it.
        window: int16 [T].
    """

    frame: int
    window: np.ndarray


class Starts(NamedTuple):
    """Where the windows that overlap each frame of a clip may start, in steps of the grid from the clip's start: from
    `first` to `last`, int64 [F]; none where `last` is less. A clip of one frame has all that its sound has room for.
    """

    first: np.ndarray
    last: np.ndarray


class SoundWindows:
    """Draws and reads windows.

    Args:
        wanted: their length, rate, grid and loudness.
        reader: of the clips.
        seed: the run's.

    Raises:
        InputError: soundfile is not installed.
    """

    def __init__(self, wanted: SoundConfig, reader: ShardReader, seed: int) -> None:
        soundfile()
        self.wanted, self._reader, self._seed = wanted, reader, seed

    def hear(self, sample_id: int, epoch: int) -> Heard:
        """The frame and the window of a sample in an epoch.

        Raises:
            SampleError: it has no sound, not enough of it, or damaged one.
            ShardLost, InputError: as of `ShardReader.read`.
        """
        wanted, payload = self.wanted, self._reader.sound(sample_id)
        facts = self._reader.clip(sample_id)
        assert facts is not None  # it has sound
        starts = possible_starts(facts, wanted)
        seen = np.flatnonzero(starts.last >= starts.first)
        draws = uniform_at(self._seed, epoch, sample_id, 0, _PURPOSE, num=3)
        frame = int(seen[int(draws[_FRAME] * len(seen))])
        first, last = int(starts.first[frame]), int(starts.last[frame])
        start = (first + int(draws[_START] * (last + 1 - first))) * wanted.grid
        window = decode_window(payload, start - _begin(facts), wanted.num_samples)
        louder = 1 - wanted.loudness * draws[_LOUDNESS]
        return Heard(frame, np.rint(window * louder).astype(np.int16))

    def in_the_middle(self, sample_id: int) -> np.ndarray:
        """The window on the grid whose own middle is nearest to the frame in the middle of a clip, or to that of the
        sound of a clip of one frame; as loud as it is: int16 [T].

        Raises:
            SampleError: as of `hear`, or no window overlaps that frame.
            ShardLost, InputError: as of `ShardReader.read`.
        """
        wanted, payload = self.wanted, self._reader.sound(sample_id)
        facts = self._reader.clip(sample_id)
        assert facts is not None  # it has sound
        starts, frame = possible_starts(facts, wanted), len(facts.times) // 2
        first, last = int(starts.first[frame]), int(starts.last[frame])
        if last < first:
            raise SampleError("no window of its sound overlaps the frame in the middle")
        number = (first + last) // 2
        if len(facts.times) > 1:
            place = float(facts.times[frame]) * wanted.rate - wanted.num_samples / 2
            number = min(max(first, round(place / wanted.grid)), last)
        return decode_window(payload, number * wanted.grid - _begin(facts), wanted.num_samples)


def _begin(facts: ClipFacts) -> int:
    """The place of the first sample of a clip's sound, in samples from the clip's start."""
    return round(facts.sound_start * facts.sound_rate)


def possible_starts(facts: ClipFacts, wanted: SoundConfig) -> Starts:
    """Where windows of a clip may start.

    Raises:
        SampleError: nowhere.
    """
    if facts.sound_rate != wanted.rate:
        raise SampleError(f"its sound has {facts.sound_rate} samples per second, not {wanted.rate}")
    begin, grid, length = _begin(facts), wanted.grid, wanted.num_samples
    first = np.full(len(facts.times), -(-begin // grid))
    last = np.full(len(facts.times), (begin + facts.sound_samples - length) // grid)
    if len(facts.times) > 1:
        places = np.rint(facts.times.astype(np.float64) * wanted.rate).astype(np.int64)
        first = np.maximum(first, -(-(places - length + 1) // grid))
        last = np.minimum(last, places // grid)
    if (last < first).all():
        seconds = facts.sound_samples / facts.sound_rate
        raise SampleError(
            f"has {seconds:.2f} s of sound, in which no window of {wanted.seconds:g} s starts on the grid"
        )
    return Starts(first, last)


def decode_window(payload: bytes, start: int, num: int) -> np.ndarray:
    """Some samples of a FLAC file in mono, int16 [num]; the others are not decoded.

    Raises:
        SampleError: damaged, or shorter.
        InputError: soundfile is not installed.
    """
    library = soundfile()
    try:
        with library.SoundFile(io.BytesIO(payload)) as file:
            file.seek(start)
            window: np.ndarray = file.read(num, dtype="int16")
    except library.LibsndfileError as error:
        raise SampleError(f"its sound is damaged ({error.error_string})") from error
    if window.shape != (num,):
        raise SampleError("its sound is damaged: it is shorter than the index says, or not mono")
    return window


def require_sound(corpora: list[Corpus], wanted: SoundConfig) -> None:
    """Refuse folders without any sound, or with sound of another rate.

    Raises:
        InputError: naming the folder. Of one in a store only what its manifest says is known at the start.
    """
    for corpus in corpora:
        manifest = corpus.manifest
        rate = int(manifest.settings.get("sound_rate", 0)) if manifest.settings.get("clips") else 0
        if not rate or (corpus.cache is None and not _any_sound(corpus)):
            raise InputError(
                f"{corpus.where}: no sample has sound, which method.name asks for; make shards of videos with sound, "
                f"or of pairs of images and sounds, by `shards convert --clips`"
            )
        if rate != wanted.rate:
            raise InputError(
                f"{corpus.where}: its sound has {rate} samples per second; set method.sound.rate={rate}, or convert "
                f"again with --sound-rate {wanted.rate}"
            )


def has_sound(reader: ShardReader, sample_id: int) -> bool:
    """Whether a sample is a clip with sound, of any length."""
    facts = reader.clip(sample_id)
    return facts is not None and facts.sound_rate > 0


def _any_sound(corpus: Corpus) -> bool:
    indices = (read_index(corpus.manifest.index_path(number)) for number in range(len(corpus.manifest.shards)))
    return any(index.clips is not None and bool(index.clips.sound_size.any()) for index in indices)


@cache
def soundfile() -> Any:
    """The module `soundfile`.

    Raises:
        InputError: it is not installed.
    """
    try:
        import soundfile as library
    except ImportError as error:
        raise InputError("sound needs soundfile: pip install 'largescale[clips]'") from error
    return library
