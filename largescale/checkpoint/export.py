"""`largescale export`: the weights of a run in files that other programs read.

    torchvision     NAME.safetensors with torchvision's names of tensors
    timm            NAME.safetensors with timm's
    safetensors     NAME.safetensors with this project's
    huggingface     a folder that timm and transformers open
    onnx            NAME.onnx, for ONNX Runtime and other runtimes
    torch_export    NAME.pt2, for torch.export.load and what compiles it

Where only a part of the weights was trained (`model.mask`), the others are zeros, and a file of masks lies beside.
Everything is written under a temporary name, read again by whoever will read it, as far as that is installed, and
compared with the network in memory; only then it gets its name. docs/export.md shows how to load each.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from largescale.checkpoint import graphs, huggingface, timm_layout, torchvision_layout
from largescale.checkpoint.exported import Network, masks_of, read_network
from largescale.checkpoint.folder import Checkpoint
from largescale.checkpoint.foreign import load_backbone
from largescale.checkpoint.mask_file import read_about, share_left, write_mask
from largescale.checkpoint.model_card import Figure, model_card
from largescale.config.setting import a_name
from largescale.models.safetensors_content import safetensors_content
from shards.ground.errors import InputError
from shards.ground.files import naming, sync_folder

TOLERANCE = 1e-5
"""Of the outputs of what was written, relative to the largest one."""

Figures = Callable[[Checkpoint], Sequence[Figure]]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: of the file or folder.
        metadata: what it says about itself.
        num_tensors, num_bytes: what it holds.
        checked: who read it again, and how far the outputs were from the network's.
    """

    path: Path
    metadata: dict[str, str]
    num_tensors: int
    num_bytes: int
    checked: str


def export(
    run_dir: str | Path,
    out: str | Path,
    *,
    format_name: str = "torchvision",
    step: int | None = None,
    head: bool = False,
    card: Path | None = None,
    figures: Figures = lambda checkpoint: (),
) -> Exported:
    """Write the weights of a run's checkpoint to `out`, whole or not at all. Neither its shards nor a GPU are needed.

    Args:
        run_dir: folder of the run.
        out: file or, for huggingface, folder to write.
        format_name: one of FORMATS.
        step: of the checkpoint; None takes the newest whole one.
        head: with the projection head, where the format has a place for it.
        card: also write a model card to this file.
        figures: what is known of a checkpoint's worth, for the model card.

    Raises:
        InputError: another format or output, no such checkpoint, a damaged one, a network that the format has no place
            for, a package that is missing, or what was written gives other outputs.
    """
    if format_name not in FORMATS:
        raise InputError(f"--format={format_name}: expected {a_name(format_name, FORMATS)}")
    run_dir, out = Path(run_dir).expanduser(), Path(out).expanduser()
    _check_out(out, format_name)
    network = read_network(run_dir, step, head=head)
    with _staged(out) as path:
        about, load = FORMATS[format_name](network, path)
        if format_name == "huggingface":
            huggingface.write_beside(network, about["architecture"], path, figures(network.checkpoint))
        checked = _check(network, path, format_name)
        if network.config.model.mask:
            _write_mask(network, path, format_name)
        num_bytes = sum(file.stat().st_size for file in path.parent.rglob("*") if file.is_file())
    if not network.config.model.mask and not out.is_dir():
        _remove_stale_mask(out)
    if card is not None:
        in_timm = format_name in ("timm", "huggingface")
        text = model_card(network, load.replace("{FILE}", out.name), figures(network.checkpoint), in_timm=in_timm)
        with _staged(card) as path:
            path.write_text(text)
    return Exported(out, about, len(network.whole.state_dict()), num_bytes, checked)


def _torchvision(network: Network, path: Path) -> tuple[dict[str, str], str]:
    model = network.config.model
    torchvision_layout.check(model)
    tensors = _torchvision_tensors(network)
    build = torchvision_layout.build_lines(model, torchvision_layout.stem_width(network.backbone), network.head)
    about = network.about() | {"layout": "torchvision", "build": build}
    _save(tensors, about, path)
    return about, f'{build}from safetensors.torch import load_file\nmodel.load_state_dict(load_file("{{FILE}}"))\n'


def _torchvision_tensors(network: Network) -> dict[str, Tensor]:
    tensors = {
        torchvision_layout.name_of(network.backbone, name): value
        for name, value in network.backbone.state_dict().items()
    }
    head = {} if network.head is None else network.head.state_dict()
    place = torchvision_layout.head_name(network.config.model)
    return tensors | {f"{place}.{name}": value for name, value in head.items()}


def _timm(network: Network, path: Path) -> tuple[dict[str, str], str]:
    if network.head is not None:
        raise InputError("--head: timm has no place for a projection head; use --format torchvision or safetensors")
    name = timm_layout.network_of(network.config.model)
    tensors = {timm_layout.name_of(key): value for key, value in _torchvision_tensors(network).items()}
    build = f'import timm\nmodel = timm.create_model("{name}", num_classes=0)\n'
    about = network.about() | {"layout": "timm", "architecture": name, "build": build}
    _save(tensors, about, path)
    return about, f'{build}from safetensors.torch import load_file\nmodel.load_state_dict(load_file("{{FILE}}"))\n'


def _huggingface(network: Network, path: Path) -> tuple[dict[str, str], str]:
    path.mkdir()
    about, _ = _timm(network, path / huggingface.WEIGHTS)
    return about, 'import timm\nmodel = timm.create_model("local-dir:{FILE}", pretrained=True)\n'


def _own(network: Network, path: Path) -> tuple[dict[str, str], str]:
    tensors = {f"backbone.{name}": value for name, value in network.backbone.state_dict().items()}
    head = {} if network.head is None else network.head.state_dict()
    about = network.about() | {"layout": "largescale"}
    _save(tensors | {f"projection.{name}": value for name, value in head.items()}, about, path)
    return about, 'import largescale\nmodel = largescale.load_backbone("{FILE}").backbone\n'


def _onnx(network: Network, path: Path) -> tuple[dict[str, str], str]:
    graphs.write_onnx(network, path)
    load = 'import onnxruntime\nsession = onnxruntime.InferenceSession("{FILE}")\n'
    return network.about() | {"layout": "onnx"}, load


def _torch_export(network: Network, path: Path) -> tuple[dict[str, str], str]:
    graphs.write_program(network, path)
    return network.about() | {"layout": "torch_export"}, 'import torch\nmodel = torch.export.load("{FILE}").module()\n'


FORMATS: dict[str, Callable[[Network, Path], tuple[dict[str, str], str]]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "safetensors": _own,
    "huggingface": _huggingface,
    "onnx": _onnx,
    "torch_export": _torch_export,
}
"""How to write each; gives what the file says about itself, and Python that loads it."""


def _write_mask(network: Network, path: Path, format_name: str) -> None:
    """Write the run's masks beside the weights, or into the folder, by the names that the weights have there."""
    masks = {_name_in(network, name, format_name): mask for name, mask in masks_of(network).items()}
    write_mask(
        _mask_file(path), masks, {"share_left": repr(share_left(masks)), "weights": network.checkpoint.content_hash}
    )


def _mask_file(out: Path) -> Path:
    """Where the masks of an export are: in a folder, or beside a file by its own name, so that net.safetensors has
    net.mask.safetensors, and net.onnx, whose masks may be others, net.onnx.mask.safetensors.
    """
    name = f"{out.name.removesuffix('.safetensors')}.mask.safetensors"
    return out / "mask.safetensors" if out.is_dir() else out.with_name(name)


def _remove_stale_mask(out: Path) -> None:
    """Remove the masks of weights that were exported here before."""
    mask = _mask_file(out)
    if read_about(mask).keys() == {"share_left", "weights"}:
        mask.unlink()
        sync_folder(mask.parent)


def _name_in(network: Network, name: str, format_name: str) -> str:
    """What a format calls a parameter of the backbone; graphs have no names of their own."""
    if format_name in ("safetensors", "onnx", "torch_export"):
        return f"backbone.{name}"
    theirs = torchvision_layout.name_of(network.backbone, name)
    return theirs if format_name == "torchvision" else timm_layout.name_of(theirs)


_SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "huggingface": ""}


def _check_out(out: Path, format_name: str) -> None:
    suffix = _SUFFIXES.get(format_name, ".safetensors")
    if suffix and (out.suffix != suffix or out.is_dir()):
        raise InputError(f"{out}: expected an output file ending in {suffix}, such as backbone{suffix}")
    if not suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already; remove it, or choose another folder for --format {format_name}")


def _save(tensors: dict[str, Tensor], about: dict[str, str], path: Path) -> None:
    """Write a file, and read it again: every tensor must be what it was."""
    with path.open("wb") as file:
        file.writelines(safetensors_content(tensors, about))
    read = safetensors.torch.load_file(path)
    if not all(_same(read[name], value) for name, value in tensors.items()):
        raise InputError(f"{path.name}: cannot be read again as it was written; check the disk")


def _same(read: Tensor, value: Tensor) -> bool:
    return torch.equal(read, value) or torch.equal(read.nan_to_num(), value.nan_to_num())


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder; what is written there gets its place when all is well."""
    is_new = not out.parent.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.writing"
    try:
        with naming(out, instead_of=folder):
            folder.mkdir()
        with naming(out, instead_of=folder / out.name):
            yield folder / out.name
            for file in folder.rglob("*"):
                if file.is_file():
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
            # What lies beside a file, such as an ONNX file's weights, comes first.
            for name in sorted(os.listdir(folder), key=lambda name: name == out.name):
                os.replace(folder / name, out.parent / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty, as it should be
                out.parent.rmdir()
    sync_folder(out.parent)


@torch.no_grad()
def _check(network: Network, path: Path, format_name: str) -> str:
    """Read again what was written, and compare outputs; those of graphs for batches of two sizes.

    Raises:
        InputError: they differ.
    """
    readers = _readers(network, path, format_name)
    worst = 0.0
    is_graph = format_name in ("onnx", "torch_export")
    for num in (2, 3) if is_graph else (2,):
        images = network.images(num)
        expected = (network.whole if is_graph else network.backbone)(images)
        for reader, run in readers.items():
            found = run(images)
            scale = max(1.0, float(expected.abs().max()))
            difference = float((found - expected).abs().max()) / scale
            if not difference <= TOLERANCE and expected.isfinite().all():
                raise InputError(
                    f"--format={format_name}: {reader} computes other features from it (by {difference:.1e} of the "
                    f"largest), so it was not kept; use another format"
                )
            worst = max(worst, difference)
    return f"read again by {' and '.join(readers)}, features equal to {worst:.0e}"


def _readers(network: Network, path: Path, format_name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    if format_name == "onnx":
        return {"onnxruntime": lambda images: graphs.run_onnx(path, images)}
    if format_name == "torch_export":
        return {"torch.export": lambda images: graphs.run_program(path, images)}
    readers: dict[str, Callable[[Tensor], Tensor]] = {"largescale": load_backbone(path, network.config.model).backbone}
    if format_name in ("timm", "huggingface") and importlib.util.find_spec("timm"):
        readers["timm"] = _in_timm(network, path, format_name)
    return readers


def _in_timm(network: Network, path: Path, format_name: str) -> Callable[[Tensor], Tensor]:
    import timm

    if format_name == "huggingface":
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        model = timm.create_model(timm_layout.network_of(network.config.model), num_classes=0)
        model.load_state_dict(safetensors.torch.load_file(path), strict=True)
    return model.eval()
