"""Covers: largescale/models/heads.py, largescale/models/unit_rows.py"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.nn.functional import adaptive_avg_pool2d

from largescale.config import ModelConfig
from largescale.methods.prototypes import Prototypes
from largescale.models.backbones import BLOCKS, build_backbone, feature_map, map_channels, map_side, pooled, stages
from largescale.models.heads import projection_head
from shards.ground.errors import InputError


@pytest.mark.parametrize(
    "name, num_features, parameters",
    [  # torchvision's published counts less those of the classifier
        ("resnet18", 512, 11_689_512 - 513_000),
        ("resnet50", 2048, 25_557_032 - 2_049_000),
        ("regnet_y_400mf", 440, 4_344_144 - 441_000),
    ],
)
def test_torchvisions_networks_without_their_classifier(name, num_features, parameters):
    backbone, width = build_backbone(ModelConfig(backbone=name))
    assert width == num_features
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    assert backbone.eval()(torch.randn(2, 3, 64, 64)).shape == (2, num_features)


@pytest.mark.parametrize(
    "name, millions",
    [
        # SwAV's table (arXiv 2006.09882, figure 2): 24, 94, 375 and 586 million.
        ("resnet50w2", 93.9),
        ("resnet50w4", 375.4),
        ("resnet50w5", 586.5),
        # SEER's (arXiv 2103.01988, table 1; 2202.08360), backbones alone.
        ("regnet_y_32gf", 141.3),
        ("regnet_y_64gf", 276.5),
        ("regnet_y_128gf", 637.4),
        ("regnet_y_256gf", 1272.2),
        ("regnet_y_10b", 9323.9),
    ],
)
def test_large_networks_have_the_published_numbers_of_parameters(name, millions):
    with torch.device("meta"):
        backbone, _ = build_backbone(ModelConfig(backbone=name))
    assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    "name, widths, depths",
    [
        ("regnet_y_32gf", [232, 696, 1392, 3712], [2, 5, 12, 1]),
        ("regnet_y_64gf", [328, 984, 1968, 4920], [2, 5, 12, 1]),
        ("regnet_y_128gf", [528, 1056, 2904, 7392], [2, 7, 17, 1]),
        ("regnet_y_256gf", [746, 1492, 4103, 10444], [2, 7, 17, 1]),
        ("regnet_y_10b", [2020, 4040, 11110, 28280], [2, 7, 17, 1]),
        ("resnet50w4", [1024, 2048, 4096, 8192], [3, 4, 6, 3]),
    ],
)
def test_large_networks_have_the_published_stages(name, widths, depths):
    with torch.device("meta"):
        backbone, num_features = build_backbone(ModelConfig(backbone=name))
        images, sizes = torch.empty(1, 3, 64, 64), []
        for stage in stages(backbone):
            stage.register_forward_hook(lambda _, __, output: sizes.append(output.shape[1]))
        assert backbone.eval()(images).shape == (1, num_features)
    assert sizes == widths and num_features == widths[-1]
    assert [len(stage) for stage in stages(backbone)] == depths


def test_a_wide_resnet_of_width_one_is_torchvisions():
    ours, _ = build_backbone(ModelConfig(backbone="resnet", depths=[3, 4, 6, 3], width=64, block="bottleneck"))
    theirs, _ = build_backbone(ModelConfig(backbone="resnet50"))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    for source, target in zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True):
        target.copy_(source)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("name", ["resnet", "resnet18", "regnet_y_400mf"])
@pytest.mark.parametrize("stem, side", [("imagenet", None), ("3x3s2", 16), ("3x3", 32)])
def test_stems_set_the_resolution_of_the_first_stage(name, stem, side):
    backbone, width = build_backbone(ModelConfig(backbone=name, stem=stem, depths=[1, 1], width=8))
    sizes = []
    first = {"resnet": "stages.0", "resnet18": "layer1", "regnet_y_400mf": "stem"}[name]
    backbone.get_submodule(first).register_forward_hook(lambda _, __, output: sizes.append(output.shape[-1]))
    assert backbone.eval()(torch.randn(1, 3, 32, 32)).shape == (1, width)
    assert sizes == [side or (16 if name.startswith("regnet") else 8)]


@pytest.mark.parametrize("block, expansion", [("basic", 1), ("bottleneck", 4)])
def test_depths_and_width_make_the_small_resnet(block, expansion):
    backbone, width = build_backbone(ModelConfig(backbone="resnet", depths=[1, 2, 1], width=8, block=block))
    assert width == 8 * 4 * expansion
    assert [len(stage) for stage in backbone.stages] == [1, 2, 1]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet", "regnet_y_400mf"])
def test_blocks_start_as_their_shortcuts_if_asked(name):
    """Of torchvision's ResNets the scales that its own option sets to 0."""
    backbone, _ = build_backbone(ModelConfig(backbone=name, depths=[1, 2], width=8, zero_init_residual=True))
    zero = {key for key, value in backbone.state_dict().items() if key.endswith("weight") and not value.any()}
    if name in ("resnet18", "resnet50"):
        theirs = torchvision.models.get_model(name, zero_init_residual=True).state_dict()
        assert zero == {key for key, value in theirs.items() if key.endswith("weight") and not value.any()}
    for block in (module for module in backbone.modules() if isinstance(module, BLOCKS)):
        x = torch.randn(2, next(block.parameters()).shape[1], 8, 8)
        shortcut = getattr(block, "proj" if name.startswith("regnet") else "downsample", None) or torch.nn.Identity()
        torch.testing.assert_close(block(x), shortcut(x).relu())
    usual, _ = build_backbone(ModelConfig(backbone=name, depths=[1, 2], width=8))
    assert len(zero) == sum(isinstance(module, BLOCKS) for module in usual.modules())
    assert all(value.any() for key, value in usual.state_dict().items() if key.endswith("weight"))


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(InputError, match=r"regnet_y_16gf.*resnet50"):
        build_backbone(ModelConfig(backbone="vit_b_16"))


def test_prototypes_are_unit_rows_and_scores_are_cosines():
    prototypes = Prototypes(8, [5, 7])
    for head in prototypes.heads:
        head.weight.data.mul_(torch.rand(len(head.weight), 1) + 0.5)
    prototypes.finish_initialisation()
    embeddings = torch.nn.functional.normalize(torch.randn(4, 8), dim=1)
    for head, scores, count in zip(prototypes.heads, prototypes(embeddings), (5, 7), strict=True):
        torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(count))
        cosines = torch.nn.functional.cosine_similarity(embeddings[:, None], head.weight[None], dim=2)
        torch.testing.assert_close(scores, cosines)


def test_the_projection_head_ends_in_a_plain_linear_layer():
    head = projection_head(16, [32, 24], 8, batchnorm=True)
    assert head(torch.randn(4, 16)).shape == (4, 8)
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert len(projection_head(16, [], 8, batchnorm=True)) == 1


@pytest.mark.parametrize("stem", ["imagenet", "3x3s2"])
@pytest.mark.parametrize("name", ["resnet", "resnet18", "regnet_y_400mf"])
def test_maps_are_what_a_backbone_pools(name, stem):
    backbone, width = build_backbone(ModelConfig(backbone=name, stem=stem, depths=[1, 1], width=8))
    images = torch.randn(2, 3, 64, 96)
    maps = feature_map(backbone.eval(), images)
    assert maps.shape[:2] == (2, width) and maps.shape[3] > maps.shape[2] > 1
    assert torch.equal(pooled(backbone, maps), backbone(images))


@pytest.mark.parametrize("name", ["resnet", "resnet18", "regnet_y_400mf", "vgg16_bn", "resnet50_sk", "resnet50w2"])
def test_features_may_be_means_of_the_cells_of_a_grid(name):
    config = ModelConfig(backbone=name, stem="3x3s2", depths=[1, 1], width=8, pool=2)
    backbone, width = build_backbone(config)
    images = torch.randn(1, 3, 64, 64)
    maps = feature_map(backbone.eval(), images)
    channels = map_channels(config, width)
    assert maps.shape[1] == channels == width // 4 and maps.shape[2] % 2 == 0
    features = backbone(images)
    cells = maps.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean((3, 5))
    torch.testing.assert_close(features, cells.flatten(1))
    torch.testing.assert_close(pooled(backbone, maps), features, rtol=0, atol=0)
    torch.testing.assert_close(features, adaptive_avg_pool2d(maps, 2).flatten(1))
    assert backbone.state_dict().keys() == build_backbone(ModelConfig(name, "3x3s2", [1, 1], 8))[0].state_dict().keys()


@pytest.mark.parametrize("name, size, side", [("resnet18", 224, 7), ("alexnet_bn", 224, 6), ("vgg16_bn", 96, 3)])
def test_the_side_of_maps_is_known_without_weights(name, size, side):
    config = ModelConfig(backbone=name)
    state = torch.random.get_rng_state()
    assert map_side(config, size) == side
    assert torch.equal(torch.random.get_rng_state(), state), "nothing is drawn"
    backbone, _ = build_backbone(config)
    assert feature_map(backbone.eval(), torch.zeros(1, 3, size, size)).shape[-1] == side
