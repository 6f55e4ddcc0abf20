"""Files of masks, and what the command says of those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from largescale.checkpoint.mask_file import hash_of, share_left, write_mask
from largescale.cli import main
from largescale.config import load_config
from largescale.models.backbones import build_backbone
from tests.helpers.commands import TINY
from tests.helpers.runs import final_state


def masks_of_tiny() -> dict[str, torch.Tensor]:
    backbone, _ = build_backbone(load_config(TINY, ["data.shards=unused"]).model)
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(value.shape, generator=generator) < 0.25
        for name, value in backbone.named_parameters()
        if value.dim() > 1
    }


def test_the_same_masks_are_the_same_bytes_and_hash(tmp_path):
    masks = masks_of_tiny()
    backwards = dict(reversed(masks.items()))
    write_mask(tmp_path / "a.safetensors", masks, {"share": "0.25", "round": "3"})
    write_mask(tmp_path / "b.safetensors", backwards, {"round": "3", "share": "0.25"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], mask) for name, mask in masks.items())
    assert hash_of(read) == hash_of(backwards)
    name = min(masks)
    assert hash_of({**masks, name: ~masks[name]}) != hash_of(masks)
    assert share_left({"a": torch.tensor([True, False]), "b": torch.tensor([False, False])}) == 0.25


@pytest.mark.slow
def test_a_run_keeps_its_mask_and_refuses_others(shard_folder, tmp_path, capsys):
    masks = masks_of_tiny()
    files = {name: tmp_path / f"{name}.safetensors" for name in ("good", "moved", "other", "named", "shaped", "typed")}
    write_mask(files["good"], masks, {})
    write_mask(files["moved"], masks, {"said": "otherwise"})
    first = min(masks)
    write_mask(files["other"], {**masks, first: ~masks[first]}, {})
    safetensors.torch.save_file({"fc.weight": masks[first]}, files["named"])
    safetensors.torch.save_file({first: masks[first][:1]}, files["shaped"])
    safetensors.torch.save_file({first: masks[first].float()}, files["typed"])

    def pretrain(mask: Path | str, *more: str) -> tuple[int, str]:
        capsys.readouterr()
        given = [f"data.shards={shard_folder}", f"run.dir={tmp_path / 'run'}", f"model.mask={mask}", *more]
        code = main(["pretrain", str(TINY), *given])
        said = capsys.readouterr()
        return code, said.out + said.err

    for mask, says in (
        ("absent.safetensors", "error: model.mask=absent.safetensors: no such file"),
        (files["named"], "fc.weight: no parameter of this backbone"),
        (files["shaped"], f"{first}: [1, "),
        (files["typed"], f"{first}: float32; expected a bool per weight"),
    ):
        for print_only in ([], ["--print"]):
            code, said = pretrain(mask, *print_only)
            assert code == 2 and said.count("\n") == 1 and says in said, said
    assert not (tmp_path / "run").exists()

    code, said = pretrain(files["good"], "train.steps=6", "optim.warmup_epochs=0")
    assert code == 0 and "% of the weights are left" in said, said
    state = final_state(tmp_path / "run")
    for name, mask in masks.items():
        assert not state[f"model.backbone.{name}"][~mask].any()
        assert not state[f"optimizer.backbone.{name}.momentum_buffer"][~mask].any()
        assert state[f"model.backbone.{name}"][mask].all()

    for mask, says in (
        (files["other"], f"it began with the mask {hash_of(masks)[:12]}, and model.mask={files['other']} is "),
        ("", f"it began with the mask {hash_of(masks)[:12]}, and model.mask is empty; set it back, or use another run"),
    ):
        code, said = pretrain(mask, "train.steps=6", "optim.warmup_epochs=0")
        assert code == 2 and said.count("error") == 1 and says in said, said
    code, said = pretrain(files["moved"], "train.steps=6", "optim.warmup_epochs=0")
    assert code == 0 and "is complete" in said
    record = json.loads(next((tmp_path / "run").glob("checkpoints/*6/progress.json")).read_text())["mask"]
    assert record == {"sha256": hash_of(masks), "share_left": share_left(masks)}

    code, said = pretrain("", "train.steps=6", f"run.dir={tmp_path / 'whole'}")
    assert code == 0
    code, said = pretrain(files["good"], "train.steps=6", f"run.dir={tmp_path / 'whole'}")
    assert code == 2 and "it began with no mask, and model.mask=" in said
