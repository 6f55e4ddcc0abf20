"""What the index beside a tar knows of clips: columns by clip, and columns by frame, one clip's after the other's."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

_PREFIX = "clip_"

_BY_CLIP = {
    "start": np.float64,
    "frame_end": np.uint64,
    "sound_offset": np.uint64,
    "sound_size": np.uint32,
    "sound_checksum": np.uint64,
    "sound_rate": np.uint32,
    "sound_start": np.float32,
    "sound_samples": np.uint32,
}
_BY_FRAME = {"offset": np.uint64, "size": np.uint32, "checksum": np.uint64, "time": np.float32, "motion": np.float16}


@dataclass(frozen=True)
class ClipColumns:
    """The clips of one shard.

    Attributes:
        start: seconds from the first frame of its video to the clip, float64 [N].
        frame_end: how many frames this clip and those before it have together, uint64 [N].
        sound_offset, sound_size: of the bytes of its FLAC file in the tar; size 0 for no sound, uint64 and uint32 [N].
        sound_checksum: xxh3-64 of these bytes, uint64 [N].
        sound_rate, sound_samples: samples per second, and their number, uint32 [N].
        sound_start: seconds from the clip's start to the first sample, float32 [N].
        offset, size: of the bytes of each frame in the tar, uint64 and uint32 [F].
        checksum: xxh3-64 of these bytes, uint64 [F].
        time: seconds from its clip's start, float32 [F].
        motion: mean absolute change of luma (0 to 255) from the frame before, float16 [F].
    """

    start: np.ndarray
    frame_end: np.ndarray
    sound_offset: np.ndarray
    sound_size: np.ndarray
    sound_checksum: np.ndarray
    sound_rate: np.ndarray
    sound_start: np.ndarray
    sound_samples: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    checksum: np.ndarray
    time: np.ndarray
    motion: np.ndarray

    def num_frames(self) -> np.ndarray:
        """Frames of each clip, int64 [N]."""
        return np.diff(self.frame_end.astype(np.int64), prepend=0)

    def frames(self, row: int) -> range:
        """Where the frames of a clip are in the columns by frame."""
        return range(self.frame_end.item(row - 1) if row else 0, self.frame_end.item(row))

    def as_columns(self) -> dict[str, np.ndarray]:
        """The columns by the names that they have in the file."""
        return {
            _PREFIX + name: np.asarray(getattr(self, name), dtype) for name, dtype in (_BY_CLIP | _BY_FRAME).items()
        }

    def fits(self, num_clips: int) -> bool:
        """Whether all columns have the lengths that they should have."""
        num_frames = self.frame_end.item(-1) if len(self.frame_end) else 0
        ends = self.frame_end.astype(np.int64)
        return (
            all(len(getattr(self, name)) == num_clips for name in _BY_CLIP)
            and all(len(getattr(self, name)) == num_frames for name in _BY_FRAME)
            and bool((np.diff(ends, prepend=0) > 0).all())
        )


def clips_in(columns: dict[str, np.ndarray]) -> ClipColumns | None:
    """The clips in the columns of an index; None for one of images. KeyError: a column is missing."""
    if f"{_PREFIX}frame_end" not in columns:
        return None
    return ClipColumns(**{field.name: columns[_PREFIX + field.name] for field in fields(ClipColumns)})


def columns_of(by_clip: list[tuple[float | int, ...]], by_frame: list[tuple[float | int, ...]]) -> ClipColumns:
    """Columns from rows of numbers, in the order of the attributes."""
    pairs = ((by_clip, _BY_CLIP), (by_frame, _BY_FRAME))
    return ClipColumns(
        **{
            name: np.array([row[place] for row in rows], dtype)
            for rows, dtypes in pairs
            for place, (name, dtype) in enumerate(dtypes.items())
        }
    )
