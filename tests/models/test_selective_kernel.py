"""ResNets with selective kernels: the published sizes, a loop beside the block, and what is made of them elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from largescale.checkpoint.foreign import load_backbone
from largescale.config import ModelConfig, load_config
from largescale.evaluate.fcn import dilate
from largescale.methods import build_method
from largescale.models import selective_kernel
from largescale.models.backbones import BLOCKS, build_backbone, feature_map, in_sequence, pooled, stages
from largescale.models.initialise import materialise
from largescale.models.recompute import recompute_activations
from largescale.models.selective_kernel import (
    SELECTIVE_KERNEL_RESNETS,
    SelectiveBottleneck,
    SelectiveKernel,
    SelectiveKernelResNet,
)
from largescale.parallel.strategies import build_engine
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step


@pytest.mark.parametrize(
    "name, millions, width",
    [  # arXiv 2006.10029, table 1: all variables of the backbone, running statistics among them
        ("resnet50_sk", 35, 2048),
        ("resnet50w2_sk", 140, 4096),
        ("resnet101_sk", 65, 2048),
        ("resnet101w2_sk", 257, 4096),
        ("resnet152_sk", 89, 2048),
        ("resnet152w2_sk", 354, 4096),
        ("resnet152w3_sk", 795, 6144),
    ],
)
def test_published_sizes(name, millions, width):
    with torch.device("meta"):
        backbone, num_features = build_backbone(ModelConfig(backbone=name))
        assert backbone.eval()(torch.empty(1, 3, 224, 224)).shape == (1, num_features) and num_features == width
    variables = [value for name, value in backbone.state_dict().items() if not name.endswith("num_batches_tracked")]
    assert round(sum(value.numel() for value in variables) / 1e6) == millions


def small(depths: tuple[int, ...] = (1, 1), stem: str = "imagenet") -> SelectiveKernelResNet:
    """Of the smallest width there is, and a few blocks."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(selective_kernel.DEPTHS, 50, list(depths))
        return SelectiveKernelResNet("resnet50_sk", stem)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_is_the_loop_over_images_and_channels(stride):
    torch.manual_seed(0)
    block = SelectiveBottleneck(6, 4, stride, shortcut=True).double().eval()
    for tensor in block.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)

    def norm(bn: nn.Module, y: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                (y[:, c] - bn.running_mean[c]) / (bn.running_var[c] + bn.eps) ** 0.5 * bn.weight[c] + bn.bias[c]
                for c in range(y.shape[1])
            ],
            1,
        )

    select, expected = block.select, []
    for image in x:
        y = norm(block.bn1, conv2d(image[None], block.conv1.weight)).clamp_min(0)
        y = norm(select.bn, conv2d(y, select.conv.weight, stride=stride, padding=1)).clamp_min(0)[0]
        sums = torch.stack([(y[c] + y[4 + c]).mean() for c in range(4)])
        hidden = norm(select.squeeze_bn, (select.squeeze.weight[:, :, 0, 0] @ sums)[None])[0].clamp_min(0)
        asked = select.expand.weight[:, :, 0, 0] @ hidden
        shares = [1 / (1 + torch.exp(asked[4 + c] - asked[c])) for c in range(4)]
        y = torch.stack([shares[c] * y[c] + (1 - shares[c]) * y[4 + c] for c in range(4)])
        y = norm(block.bn3, conv2d(y[None], block.conv3.weight))[0]
        side = 6 // stride
        means = torch.empty(6, side, side, dtype=torch.float64)
        for i in range(side):
            for j in range(side):
                means[:, i, j] = image[:, i * stride : i * stride + 2, j * stride : j * stride + 2].mean((1, 2))
        shortcut = norm(block.downsample[2], conv2d(means[None], block.downsample[1].weight))[0]
        expected.append((y + shortcut).clamp_min(0))
    torch.testing.assert_close(block(x), torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_equal_streams_are_an_ordinary_convolution():
    torch.manual_seed(0)
    select = SelectiveKernel(5, 4, 1).eval()
    with torch.no_grad():
        select.conv.weight[4:] = select.conv.weight[:4]
    x = torch.randn(3, 5, 7, 7)
    expected = torch.relu(conv2d(x, select.conv.weight[:4], padding=1) / (1 + select.bn.eps) ** 0.5)
    torch.testing.assert_close(select(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stem, sides", [("imagenet", [16, 8]), ("3x3s2", [32, 16]), ("3x3", [64, 32])])
def test_sides_of_maps_and_the_parts_of_the_network(stem, sides):
    backbone = small(stem=stem).eval()
    x, found = torch.randn(2, 3, 64, 64), []
    body = in_sequence(backbone)
    y = x
    for module in body:
        y = module(y)
        found.append(y.shape[-1])
    assert found[1:] == sides and len(stages(backbone)) == 2
    assert torch.equal(feature_map(backbone, x), y)
    torch.testing.assert_close(pooled(backbone, y), backbone(x))
    assert all(isinstance(block, BLOCKS) for stage in stages(backbone) for block in stage)


def test_odd_sides_agree_between_branch_and_shortcut():
    for side in (28, 29, 31, 33):
        assert small().eval()(torch.randn(1, 3, side, side)).isfinite().all()


def test_a_block_can_start_as_its_shortcut():
    backbone, _ = build_backbone(ModelConfig(backbone="resnet50_sk", stem="3x3s2", zero_init_residual=True))
    block = backbone.stages[1][1].eval()
    x = torch.randn(2, 512, 5, 5).relu()
    assert torch.equal(block(x), x)


def test_recomputing_and_drawing_in_pieces_change_nothing():
    backbone = small(stem="3x3s2")
    x = torch.randn(4, 3, 24, 24)
    expected = torch.autograd.grad(backbone(x).square().sum(), list(backbone.parameters()))
    recompute_activations(backbone, [1, 2])
    found = torch.autograd.grad(backbone(x).square().sum(), list(backbone.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    with torch.device("meta"):
        drawn = small(stem="3x3s2")
    materialise(drawn, torch.device("cpu"), 3)
    assert all(value.isfinite().all() for value in drawn.state_dict().values())


def test_a_dilated_stage_keeps_the_size_of_maps():
    backbone = small(stem="3x3").eval()
    dilate(backbone.stages[1])
    assert feature_map(backbone, torch.randn(1, 3, 16, 16)).shape[-1] == 16


@pytest.mark.slow
def test_a_graph_for_onnx_computes_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone, x = small(depths=(2, 1)).eval(), torch.randn(2, 3, 64, 64)
    path = tmp_path / "backbone.onnx"
    torch.onnx.export(backbone, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), backbone(x), rtol=1e-3, atol=1e-4)


def test_names_and_own_files(tmp_path):
    assert set(SELECTIVE_KERNEL_RESNETS) == {
        f"resnet{depth}{width}_sk" for depth in (50, 101, 152) for width in ("", "w2", "w3")
    }
    backbone, _ = build_backbone(ModelConfig(backbone="resnet50_sk"))
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in backbone.state_dict().items()}}, tmp_path / "own.pt")
    found = load_backbone(tmp_path / "own.pt")
    x = torch.randn(1, 3, 64, 64)
    assert (found.model.backbone, found.model.stem) == ("resnet50_sk", "imagenet")
    assert torch.equal(found.backbone(x), backbone.eval()(x))


def losses(strategies: list[str]) -> list[list[float]]:
    found = []
    selective_kernel.DEPTHS[50] = [1, 1]  # of this rank's process alone
    for strategy in strategies:
        settings = ["model.backbone=resnet50_sk", "train.global_batch=8", f"parallel.strategy={strategy}"]
        config = load_config(ROOT / "tests/methods/mini/simclr.yaml", settings)
        torch.manual_seed(0)
        engine = build_engine(build_method(config), config, torch.device("cpu"))
        found.append([])
        for step in range(2):
            views = views_of_step(config, step)
            check = engine.check(views, engine.forward_backward(views, step).loss)
            engine.update(check, step=step, lr=0.1, clip=0.0)
            found[-1].append(check.loss)
    return found


@pytest.mark.distributed
def test_two_ranks_train_it_as_one_does():
    [[alone]] = run_ranks(losses, 1, ["ddp"], timeout_s=300)
    for found in run_ranks(losses, 2, ["ddp", "fsdp"], timeout_s=300)[0]:
        assert found == pytest.approx(alone, rel=1e-7)
