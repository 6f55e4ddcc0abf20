"""The settings of sound windows: what is heard with an image of a clip, for methods that ask for it."""

from __future__ import annotations

from dataclasses import dataclass

from largescale.config.setting import setting


@dataclass
class SoundConfig:
    """Which stretch of a clip's sound goes with the frame that is seen."""

    seconds: float = setting(
        1.0, "Length of a window; clips with less sound are replaced, as unreadable images are.", above=0, at_most=600
    )
    rate: int = setting(
        48_000,
        "Samples per second; that of the shards (`shards convert --sound-rate`), since nothing is resampled here.",
        at_least=1000,
        at_most=192_000,
    )
    grid_s: float = setting(
        0.04,
        "Windows start at multiples of this many seconds from the clip's start, so that where one starts says nothing; "
        "0 starts them at any sample.",
        at_least=0,
        at_most=600,
    )
    loudness: float = setting(
        0.2, "A window is multiplied by a random number between 1 less this and 1.", at_least=0, at_most=1
    )

    @property
    def num_samples(self) -> int:
        """Samples of a window."""
        return max(1, round(self.seconds * self.rate))

    @property
    def grid(self) -> int:
        """Samples from one possible start to the next."""
        return max(1, round(self.grid_s * self.rate))
