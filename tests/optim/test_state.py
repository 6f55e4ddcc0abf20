from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from largescale.parallel.engine import Engine


def test_room_for_a_checkpoint_is_made_where_the_parameter_is():
    """Fused AdamW reads its count of steps on the device of the parameter; on a GPU one in host memory ends the run."""
    method = nn.Linear(3, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(method.parameters(), fused=False)
    shapes = {"optimizer.weight.step": (), "optimizer.weight.exp_avg": (2, 3), "model.weight": (2, 3)}
    Engine.prepare_optimizer_state(SimpleNamespace(method=method, optimizer=optimizer), shapes)
    state = optimizer.state[method.weight]
    assert {name: (value.device.type, tuple(value.shape)) for name, value in state.items()} == {
        "step": ("meta", ()),
        "exp_avg": ("meta", (2, 3)),
    }
