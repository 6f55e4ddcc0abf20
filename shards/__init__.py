"""Makes and inspects WebDataset shards; needs no torch.

    import shards

    if __name__ == "__main__":  # workers that read from a store load the program again
        shards.convert("photos", "data/photos", shuffle=0)
        assert shards.verify("data/photos") == []
        for sample in shards.open("data/photos"):
            print(sample.key, sample.width, sample.height, len(sample.image))

Each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.public import convert, index, open, repair, verify

__all__ = ["convert", "index", "open", "repair", "verify"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("shards.public"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
