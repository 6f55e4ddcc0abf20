"""Self-supervised pretraining at scale: shards in, measured representations out.

    import largescale

    config = largescale.load_config("small/swav", ["data.shards=data/photos"])
    largescale.pretrain(config)
    network = largescale.load(config.run.dir)
    features = network.encode(images)
    results = largescale.evaluate("knn", config.run.dir, overrides=["data.eval_shards=data/photos-test"])
    largescale.export(config.run.dir, "photos.onnx", format_name="onnx")
    others = largescale.load_backbone("resnet50.pth").backbone

Each name is imported when it is first used, so that this alone takes no time and needs no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largescale.checkpoint.export import export
    from largescale.checkpoint.foreign import load_backbone
    from largescale.config import load_config
    from largescale.evaluate.measure import evaluate
    from largescale.evaluate.network import load
    from largescale.methods import METHODS
    from largescale.pretrain import pretrain

__all__ = ["METHODS", "__version__", "evaluate", "export", "load", "load_backbone", "load_config", "pretrain"]
__version__ = "0.1.0"

_HOMES = {
    "METHODS": "largescale.methods",
    "evaluate": "largescale.evaluate.measure",
    "export": "largescale.checkpoint.export",
    "load": "largescale.evaluate.network",
    "load_backbone": "largescale.checkpoint.foreign",
    "load_config": "largescale.config",
    "pretrain": "largescale.pretrain",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    return sys.modules[f"{__name__}.evaluate"] if name == "evaluate" else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Callable(ModuleType):
    """`largescale.evaluate`: the package of that name, which can be called as the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return import_module(_HOMES["evaluate"]).evaluate(*arguments, **options)


class _Package(ModuleType):
    """`largescale.pretrain` is the function, also once the module of that name, which holds it, is imported: Python
    then sets this package's attribute to the module. `largescale.evaluate` is a package, and can be called.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "evaluate" and isinstance(value, ModuleType):
            value.__class__ = _Callable
        super().__setattr__(name, value.pretrain if name == "pretrain" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
