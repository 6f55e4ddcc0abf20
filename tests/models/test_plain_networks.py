"""VGG-16 and AlexNet beside torchvision's, at small and large sizes, sharded and recomputed."""

from __future__ import annotations

import pytest
import torch
import torchvision

from largescale.checkpoint.foreign import load_backbone
from largescale.checkpoint.torchvision_layout import name_of
from largescale.config import ModelConfig, load_config
from largescale.evaluate.detector import build_detector
from largescale.evaluate.fcn import dilate
from largescale.methods import build_method
from largescale.models.backbones import BLOCKS, build_backbone, feature_map, in_sequence, pooled, stages
from largescale.models.initialise import materialise
from largescale.models.recompute import recompute_activations
from largescale.models.small_maps import SmallMapConv2d, multiply_small_maps
from largescale.parallel.strategies import build_engine
from shards.ground.errors import InputError
from tests.helpers.commands import ROOT
from tests.helpers.ranks import run_ranks
from tests.methods.harness import views_of_step

NAMES = ["vgg16_bn", "alexnet_bn"]


def test_maps_of_torchvisions_weights_are_torchvisions(tmp_path):
    theirs = torchvision.models.vgg16_bn().eval()
    for tensor in theirs.features.state_dict().values():
        if tensor.ndim == 1:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    torch.save(theirs.state_dict(), tmp_path / "vgg16_bn.pth")
    found = load_backbone(tmp_path / "vgg16_bn.pth")
    assert found.model.backbone == "vgg16_bn" and found.taken.layout == "torchvision's VGG"
    assert sorted(found.taken.left) == sorted(name for name in theirs.state_dict() if name.startswith("classifier."))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = theirs.features(images)
        torch.testing.assert_close(feature_map(found.backbone, images), maps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.backbone(images), maps.mean((2, 3)), rtol=1e-5, atol=1e-5)


def test_deepclusters_file_is_an_alexnet_with_edges(tmp_path):
    """Names as its authors' code gives them: a parallel trunk, a fixed filter beside it, heads."""
    ours, _ = build_backbone(ModelConfig(backbone="alexnet_bn", sobel=True))
    state = {name_of(ours, name).replace("features.", "features.module."): v for name, v in ours.state_dict().items()}
    assert {name.split(".")[2] for name in state} == {"0", "1", "4", "5", "8", "9", "11", "12", "14", "15"}
    state |= {f"{name}.weight": torch.zeros(2, 1, 3, 3) for name in ("sobel.0", "sobel.1", "classifier.1", "top_layer")}
    torch.save({"state_dict": state}, tmp_path / "checkpoint.pth.tar")
    found = load_backbone(tmp_path / "checkpoint.pth.tar")
    assert (found.model.backbone, found.model.sobel) == ("alexnet_bn", True)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(found.backbone(images), ours.eval()(images))


@pytest.mark.parametrize(
    "name, stem, size, sides, last",
    [
        ("vgg16_bn", "imagenet", 224, [224, 112, 56, 28, 14], 7),
        ("vgg16_bn", "3x3s2", 28, [14, 14, 7, 4, 2], 1),
        ("vgg16_bn", "3x3", 28, [28, 28, 14, 7, 4], 2),
        ("alexnet_bn", "imagenet", 224, [55, 27, 13, 13, 13], 6),
        ("alexnet_bn", "3x3s2", 28, [14, 14, 7, 7, 7], 3),
        ("alexnet_bn", "3x3", 28, [28, 28, 14, 14, 14], 7),
    ],
)
def test_sides_of_maps(name, stem, size, sides, last):
    with torch.device("meta"):
        backbone, width = build_backbone(ModelConfig(backbone=name, stem=stem))
        body, x, found = in_sequence(backbone), torch.empty(2, 3, size, size), []
        for module in body:
            x = module(x)
            found.append(x.shape[-1])
        assert found[1:] == sides
        assert feature_map(backbone, torch.empty(2, 3, size, size)).shape == (2, width, last, last)


def test_images_below_the_published_stem_are_a_line():
    backbone, _ = build_backbone(ModelConfig(backbone="alexnet_bn"))
    with pytest.raises(InputError, match=r"images of 28x28 px.*needs 63; use model.stem=3x3s2 or 3x3"):
        backbone(torch.zeros(2, 3, 28, 28))
    assert backbone.eval()(torch.zeros(1, 3, 63, 63)).shape == (1, 256)


@pytest.mark.parametrize(
    "name, stem, least", [("alexnet_bn", "3x3s2", 7), ("alexnet_bn", "3x3", 4), ("vgg16_bn", "3x3s2", 1)]
)
def test_small_stems_have_a_least_side_too(name, stem, least):
    backbone, width = build_backbone(ModelConfig(backbone=name, stem=stem))
    assert backbone.eval()(torch.zeros(1, 3, least, least)).shape == (1, width)
    if least > 1:
        with pytest.raises(InputError, match=rf"with model.stem={stem} it needs {least}; use larger crops"):
            backbone(torch.zeros(1, 3, least - 1, least - 1))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_recomputed_and_small_maps_multiplied_with_equal_gradients(name):
    backbone, _ = build_backbone(ModelConfig(backbone=name, stem="3x3s2", sobel=True))
    backbone.double()
    images = torch.randn(3, 3, 28, 28, dtype=torch.float64)
    assert torch.equal(pooled(backbone, feature_map(backbone.eval(), images)), backbone(images))
    backbone.train()(images).square().sum().backward()
    expected = {key: p.grad for key, p in backbone.named_parameters()}
    backbone.zero_grad()
    multiply_small_maps(backbone)
    assert any(isinstance(module, SmallMapConv2d) for module in backbone.modules())
    recompute_activations(backbone, [1, 2, 3, 4, 5])
    backbone(images).square().sum().backward()
    for key, parameter in backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-9, atol=1e-9)


def test_what_only_residual_networks_have_is_a_line():
    with pytest.raises(InputError, match="zero_init_residual: vgg16_bn has no residual blocks"):
        build_backbone(ModelConfig(backbone="vgg16_bn", zero_init_residual=True))
    backbone, _ = build_backbone(ModelConfig(backbone="alexnet_bn"))
    with pytest.raises(InputError, match="alexnet_bn: detection needs the stages"):
        build_detector(backbone, 3, None, torch.device("cpu"))


def test_a_dilated_last_stage_keeps_the_size_of_its_maps():
    body = in_sequence(build_backbone(ModelConfig(backbone="vgg16_bn"))[0]).eval()
    images = torch.randn(1, 3, 64, 64)
    dilate(body.get_submodule("stage5"))
    assert body(images).shape == (1, 512, 8, 8)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_drawn_as_the_constructor_draws_and_filters_are_put_back(name):
    config = ModelConfig(backbone=name, stem="3x3", sobel=True)
    usual, _ = build_backbone(config)
    with torch.device("meta"):
        drawn, _ = build_backbone(config)
    materialise(drawn, torch.device("cpu"), 0)
    for (key, one), (_, other) in zip(drawn.named_parameters(), usual.named_parameters(), strict=True):
        if one.ndim == 4 and one.numel() > 10_000:
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.05), key
        elif one.ndim == 1:
            assert torch.equal(one, other), key
    for (key, one), (_, other) in zip(drawn.named_buffers(), usual.named_buffers(), strict=True):
        assert torch.equal(one, other), key
    assert sum(isinstance(module, BLOCKS) for stage in stages(drawn) for module in stage) in (13, 5)


def losses(strategy: str, *more: str) -> list[float]:
    network = ["model.backbone=alexnet_bn", "model.stem=3x3s2", "model.sobel=true", "optim.name=sgd", "optim.lr=0.05"]
    config = load_config(
        ROOT / "tests/strategies.yaml", [*network, f"parallel.strategy={strategy}", "train.precision=fp32", *more]
    )
    torch.manual_seed(config.run.seed)
    engine = build_engine(build_method(config), config, torch.device("cpu"))
    found = []
    for step in range(2):
        views = views_of_step(config, step)
        check = engine.check(views, engine.forward_backward(views, step).loss)
        engine.update(check, step=step, lr=config.optim.lr, clip=config.optim.clip_grad_norm)
        found += [check.loss, check.grad_norm]
    return found


def every_strategy() -> dict[str, list[float]]:
    sharded = losses("fsdp", "model.recompute_stages=[1,2,3,4,5]")
    return {"ddp": losses("ddp"), "fsdp": sharded, "zero3": losses("zero3")}


@pytest.mark.distributed
def test_strategies_agree_on_two_ranks():
    [found, _] = run_ranks(every_strategy, 2)
    for name, one in found.items():
        assert one == pytest.approx(found["ddp"], rel=1e-4), name
