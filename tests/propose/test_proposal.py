"""The values of a proposed recipe follow what was seen, load, and fit the length of the run.

Covers: largescale/propose/views.py, largescale/propose/references.py, largescale/propose/written.py,
largescale/propose/carried.py, largescale/methods/choice.py, largescale/methods/swav/suited.py
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from largescale.config import Config, CropGroup, load_config, without_effect
from largescale.data.supports import require_shared_evenly
from largescale.methods import METHODS
from largescale.methods.choice import Choice
from largescale.propose.carried import carried
from largescale.propose.command import header
from largescale.propose.proposal import as_config, with_larger_network
from largescale.propose.references import reference
from largescale.propose.views import views
from largescale.propose.written import written
from largescale.run.schedule_check import complaints
from shards.ground.errors import InputError
from tests.helpers.proposals import CPU, EIGHT, GPU, PHOTOS, proposed


def config_of(corpus=PHOTOS, machine=CPU, method="swav", epochs=100.0):
    return as_config(proposed(corpus, machine, method).choices(Choice(epochs, "for so many hours")))


def test_photographs_on_a_cpu():
    config = config_of()
    assert [group.size for group in config.data.crops] == [64, 32]
    assert config.data.mean == list(PHOTOS.mean) and config.data.std == list(PHOTOS.std)
    assert (config.model.width, config.train.global_batch, config.optim.lr) == (32, 64, 0.002)
    assert config.method.prototypes == 96 and config.method.queue == 0
    assert config.data.augment.hue > 0 and config.data.augment.blur > 0
    assert config.evaluate.size == 64 and config.data.eval_shards == ""


def test_one_and_eight_gpus():
    many = replace(PHOTOS, num_samples=2_000_000)
    one, eight = config_of(many, GPU), config_of(many, EIGHT)
    assert (one.model.backbone, one.data.crops[0].size) == ("resnet50", 224)
    assert (one.train.global_batch, eight.train.global_batch) == (256, 2048)
    assert eight.optim.lr == pytest.approx(8 * one.optim.lr)
    assert one.method.queue == 15 * 256 and one.method.queue_start_step > 0
    assert eight.method.queue == 0 and eight.method.prototypes == one.method.prototypes == 3000
    assert config_of(replace(PHOTOS, num_samples=30_000), GPU).data.crops[0].size == 160


def test_views_are_no_larger_than_a_method_wants_them():
    for images, machine in ((1000, GPU), (2_000_000, EIGHT)):
        found = config_of(replace(PHOTOS, num_samples=images), machine, "opn")
        assert (found.data.crops[0].size, found.method.jitter, found.evaluate.size) == (90, 5, 90)
    assert config_of(machine=CPU, method="opn").data.crops[0].size == 64


def test_queues_make_up_for_batches_too_small_for_the_prototypes():
    many = replace(PHOTOS, num_samples=2_000_000)
    for batch, queue in [(32, 480), (256, 3840), (512, 3584), (1024, 3072), (2048, 0), (4096, 0)]:
        config = as_config(replace(proposed(many, GPU), batch=batch).choices(Choice(100.0, "")))
        assert (config.train.global_batch, config.method.queue) == (batch, queue)


TINY = replace(PHOTOS, shorter=(28, 28, 28), grey=1.0, std=(0.0, 0.0, 0.0))


@pytest.mark.parametrize("method", METHODS)
def test_no_view_of_tiny_grey_images_is_blurred_or_coloured(method):
    for small in (True, False):
        _, following = reference(method, small=small)
        found = views(following, TINY, small=small)
        colours = ("hue", "saturation") if found.get("data.augment.jitter", Choice(0.8, "")).value else ()
        off = {name: found[f"data.augment.{name}"].value for name in (*colours, "grayscale", "blur")}
        assert set(off.values()) == {0}
        groups = [choice.value.get("augment", {}) for choice in found["data.crops"].value]
        assert not any({*off, "blur_sigma"} & group.keys() for group in groups)
    solarised = [group.augment.get("solarise") for group in following.data.crops]
    assert [group.get("solarise") for group in groups] == solarised  # what else its groups change is kept


def test_tiny_grey_images():
    config = config_of(TINY)
    assert [group.size for group in config.data.crops] == [28, 16]
    augment = config.data.augment
    assert augment.hue == augment.saturation == augment.grayscale == augment.blur == 0
    assert min(config.data.std) > 0  # what has a single colour is not divided by 0
    assert config.evaluate.resize == config.evaluate.size == 28
    least = min(group.scale[0] for group in config.data.crops)
    assert 28 * math.sqrt(least) >= 11.5
    assert config_of(TINY, GPU).model.stem == "3x3s2"


def test_colours_of_drawings_are_changed_less():
    usual, drawings = config_of(PHOTOS).data.augment, config_of(replace(PHOTOS, flat=0.7)).data.augment
    assert usual.grayscale > 0 == drawings.grayscale
    for name, share in {"brightness": 0.125, "contrast": 0.125, "saturation": 0, "hue": 0}.items():
        assert getattr(drawings, name) == pytest.approx(share * getattr(usual, name))
    grey = replace(PHOTOS, flat=0.7, grey=1.0)  # as Fashion-MNIST's
    assert config_of(grey).data.augment.brightness == usual.brightness


def test_few_images_make_small_batches_and_too_few_are_refused():
    assert config_of(replace(PHOTOS, num_samples=64)).train.global_batch == 8
    assert config_of(replace(PHOTOS, num_samples=300)).train.global_batch == 32
    with pytest.raises(InputError, match="data/photos: 63 images are too few to train on; expected at least 64"):
        proposed(replace(PHOTOS, num_samples=63))
    with pytest.raises(InputError, match="expected at least 512"):
        proposed(replace(PHOTOS, num_samples=400), EIGHT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("machine", [CPU, EIGHT], ids=["cpu", "gpus"])
def test_every_method_gets_a_recipe_that_loads_and_fits_its_length(method, machine):
    tiny = replace(PHOTOS, shorter=(28, 28, 28), num_samples=60_000)
    for corpus in (replace(PHOTOS, num_samples=1000), replace(PHOTOS, num_samples=1_300_000), tiny):
        found = proposed(corpus, machine, method)
        config = as_config(found.choices(Choice(100.0, "")))
        named = METHODS[method].reference if machine.gpus else METHODS[method].small_reference or f"small/{method}"
        name, following = found.source
        assert name == named and config.method.name == following.method.name == method
        assert replace(config.model, stem=following.model.stem) == following.model and not found.carried.left_out
        if machine.gpus:
            assert config.parallel.batchnorm_group_size == following.parallel.batchnorm_group_size
        assert METHODS[method].misfit(config, found.length(100.0)) == ""
        assert complaints(config, found.length(100.0)) == []


@pytest.mark.parametrize("method", METHODS)
def test_no_setting_is_proposed_that_has_no_effect(method):
    small = replace(PHOTOS, shorter=(28, 28, 28))
    for corpus in (PHOTOS, replace(PHOTOS, flat=0.7), replace(PHOTOS, grey=1.0), small):
        for machine in (CPU, GPU):
            assert without_effect(as_config(proposed(corpus, machine, method).choices(Choice(100.0, "")))) == []


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_views_keep_the_shape_of_those_that_they_follow(method):
    for small in (True, False):
        _, following = reference(method, small=small)
        found = views(following, PHOTOS, small=small)
        groups = [CropGroup(**choice.value) for choice in found["data.crops"].value]
        square = [[1, 1] for _ in groups] if METHODS[method].square_crops else None
        assert [group.ratio for group in groups] == (square or [group.ratio for group in following.data.crops])
        for group, theirs in zip(groups, following.data.crops, strict=True):
            if not small or theirs.scale == [1.0, 1.0]:
                assert group.scale == theirs.scale
        assert found["evaluate.size"].value == groups[0].size


def test_evaluation_crops_are_as_large_as_views_that_are_seen_whole():
    config = config_of(PHOTOS, GPU, "pirl")  # the second is cut into patches
    assert [group.size for group in config.data.crops] == [140, 160] and config.evaluate.size == 140
    assert config.evaluate.resize == 160


def test_stages_at_the_start_fit_short_runs():
    assert config_of(PHOTOS, GPU, "pcl", epochs=3.0).method.warmup_epochs == 1
    assert config_of(PHOTOS, GPU, "artifacts", epochs=8.0).method.autoencoder_epochs == 2
    assert config_of(PHOTOS, GPU, "artifacts", epochs=100.0).method.autoencoder_epochs == 10


@pytest.mark.parametrize("machine", [CPU, GPU, EIGHT, replace(EIGHT, gpus=6)], ids=["cpu", "gpu", "gpus", "six"])
@pytest.mark.parametrize("classes", [2, 10, 365, 1000])
def test_supports_are_of_classes_that_there_are_and_ranks_can_share_them(machine, classes):
    corpus = replace(PHOTOS, num_samples=1_300_000, num_classes=classes)
    config = as_config(proposed(corpus, machine, "paws").choices(Choice(100.0, "")))
    support = config.method.supports()
    assert support.classes <= classes and support.size <= 3 * max(config.train.global_batch, 16)
    require_shared_evenly(config, max(1, machine.gpus))
    for without in (0, 1):
        with pytest.raises(InputError, match=f"labels of at least two classes, and those looked at have {without}"):
            proposed(replace(corpus, num_classes=without), machine, "paws").choices(Choice(100.0, ""))


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.rates])
@pytest.mark.parametrize("machine", [CPU, GPU, EIGHT], ids=["cpu", "gpu", "gpus"])
def test_rates_of_heads_are_scaled_as_that_of_the_network_is(machine, method):
    found = proposed(replace(PHOTOS, num_samples=1_300_000), machine, method)
    config, following = as_config(found.choices(Choice(100.0, ""))), found.source[1]
    factor = config.train.global_batch / following.train.global_batch
    assert config.optim.lr == pytest.approx(factor * following.optim.lr, rel=0.01)
    assert config.method.head_lr == pytest.approx(factor * following.method.head_lr, rel=0.01)
    assert machine is not EIGHT or factor != 1


def test_the_second_version_is_followed_not_the_first_by_name():
    assert proposed(PHOTOS, GPU, "pcl").source[0] == "pcl/resnet50_v2_200ep"
    assert config_of(PHOTOS, GPU, "pcl").method.hidden == [2048]


def test_what_is_kept_of_a_recipes_network_and_batchnorm():
    defaults = Config()
    following = replace(
        defaults,
        model=replace(defaults.model, zero_init_residual=True, recompute_stages=[1]),
        parallel=replace(defaults.parallel, strategy="fsdp", batchnorm_group_size=8),
    )
    network, group = {"model.zero_init_residual": True}, {"parallel.batchnorm_group_size": 8}
    assert carried(following, "resnet50", 0) == (network, {})
    assert carried(following, "resnet50", 16) == (network | group, {})
    for gpus in (1, 4, 12):
        assert carried(following, "resnet50", gpus) == (network, group)
    assert carried(following, "resnet50w2", 8) == (group, network)


def test_the_header_hides_gpus_that_are_not_used_and_says_what_is_left_out():
    lines = header(proposed(), 1.0, 100.0)
    assert "  largescale pretrain THIS_FILE" in lines and not any("Unlike" in line for line in lines)
    lines = header(proposed(machine=replace(CPU, hidden=True)), 1.0, 100.0)
    assert '  CUDA_VISIBLE_DEVICES="" largescale pretrain THIS_FILE' in lines
    lines = header(proposed(machine=replace(EIGHT, gpus=12), method="deepclusterv2"), 1.0, 100.0)
    assert "Unlike there, without parallel.batchnorm_group_size=8." in lines


@pytest.mark.parametrize("gpus, expected", [(8, ""), (12, "--nodes 2 --gpus 6"), (64, "--nodes 8 --gpus 8")])
def test_what_needs_several_nodes_is_sent_to_slurm(gpus, expected):
    found = proposed(machine=replace(EIGHT, gpus=gpus, here=False))
    alone = f"torchrun --standalone --nproc-per-node={gpus} -m largescale pretrain THIS_FILE"
    assert header(found, 1.0, 100.0)[2] == f"  {f'launch/slurm/submit THIS_FILE {expected}' if expected else alone}"
    assert ("launch/slurm/submit" in found.choices(Choice(1.0, ""))["parallel.strategy"].reason) == bool(expected)


def test_a_larger_network_where_the_hours_allow_it():
    larger = with_larger_network(proposed())
    config = as_config(larger.choices(Choice(100.0, "")))
    assert (config.model.depths, config.model.width) == ([2, 2, 2, 2], 64)


def test_reasons_stand_beside_values_that_any_text_can_be(tmp_path):
    choices = {
        "name": Choice("on", "a word that YAML takes for true"),
        "data.shards": Choice("a: b # c", "a path"),
        "data.mean": Choice([1e-6, 0.5, 1.0], "small"),
        "data.crops": Choice([Choice({"num": 2, "size": 24, "scale": [0.3, 1.0]}, "only these")], ""),
    }
    text = written(["First line"], choices)
    assert text.startswith("# First line\nname: 'on'  # a word that YAML takes for true\n\ndata:\n")
    assert "  - {num: 2, size: 24, scale: [0.3, 1.0]}  # only these\n" in text.replace("    -", "  -")
    (tmp_path / "recipe.yaml").write_text(text)
    config = load_config(tmp_path / "recipe.yaml")
    assert (config.name, config.data.shards, config.data.mean[0]) == ("on", "a: b # c", 1e-6)


def test_a_method_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="--method swaw: expected one of swav"):
        proposed(method="swaw")
