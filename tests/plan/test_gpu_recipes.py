"""The recipes for one GPU and for eight fit these."""

from __future__ import annotations

import pytest

from largescale.config import load_config
from largescale.plan.planner import Request, plan

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "recipe, gpus, gpu", [("one-gpu/imagenet_200ep", 1, "a100-40"), ("eight-gpu/imagenet_200ep_bs2048", 8, "a100-40")]
)
def test_recipes_fit_the_gpus_they_are_for(recipe, gpus, gpu):
    planned = plan(load_config(recipe, ["data.shards=x"]), Request(gpus, gpu), advise=False)
    assert planned["fits"] and planned["batch_per_gpu"] == 256
