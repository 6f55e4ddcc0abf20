"""Random weights for a network that no rank ever holds: built on the meta device, cut by FSDP2, drawn piece by piece.

Every tensor is a function of (seed, its name): each rank draws one whole tensor after the other, keeps its piece and
forgets the rest. So the network does not depend on the number of ranks; it is another draw than the one that
constructors make. The distributions are theirs: convolutions normal with variance 2 / fan-out (arXiv 1502.01852), as
torchvision's ResNet and RegNet have them; linear layers, and convolutions of heads, uniform as torch's.
"""

from __future__ import annotations

import math

import torch
import xxhash
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.modules.batchnorm import _BatchNorm

from largescale.models.backbones import finish_block
from largescale.models.heads import HeadConv2d


def materialise(network: nn.Module, device: torch.device, seed: int) -> None:
    """Give a network on the meta device memory and weights. Collectives: none."""
    network.to_empty(device=device)
    initialise_pieces(network, seed)


@torch.no_grad()
def initialise_pieces(network: nn.Module, seed: int) -> None:
    """Fill the parameters and buffers of a network, whole or sharded by FSDP2.

    A module whose weights fulfil a condition brings them to it in a method `finish_initialisation`, which is called
    when all are drawn and works on local pieces.

    Memory: one whole tensor at a time, in float32, on the host.

    Collectives: none.
    """
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm | nn.GroupNorm):
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
            for parameter, value in ((module.weight, 1.0), (module.bias, 0.0)):
                _piece(parameter).fill_(value)
            continue
        for buffer in module.buffers(recurse=False):
            buffer.zero_()
        for key, parameter in module.named_parameters(recurse=False):
            _keep_piece(parameter, _draw(module, key, tuple(parameter.shape), f"{seed} {name}.{key}"))
    for module in network.modules():
        finish_block(module)
        if finish := getattr(module, "finish_initialisation", None):
            finish()


def _draw(module: nn.Module, key: str, shape: tuple[int, ...], name: str) -> Tensor:
    """Draw a whole tensor from the seed and its name."""
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode()) >> 1)
    if isinstance(module, nn.Conv2d) and not isinstance(module, HeadConv2d):
        if key == "bias":
            return torch.zeros(shape)
        fan_out = shape[0] * math.prod(shape[2:])
        return torch.empty(shape).normal_(0.0, math.sqrt(2 / fan_out), generator=generator)
    if isinstance(module, (nn.Linear, HeadConv2d)):
        bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    raise TypeError(f"no rule for {key} of {type(module).__name__}")


def _keep_piece(parameter: Tensor, whole: Tensor) -> None:
    if isinstance(parameter, DTensor):
        # FSDP2 cuts dimension 0 into equal chunks, the last ones of which may be short or empty.
        [(mesh_dim, placement)] = [(dim, p) for dim, p in enumerate(parameter.placements) if isinstance(p, Shard)]
        chunks = whole.chunk(parameter.device_mesh.size(mesh_dim), placement.dim)
        place = parameter.device_mesh.get_local_rank(mesh_dim)
        whole = chunks[place] if place < len(chunks) else whole.narrow(placement.dim, 0, 0)
    _piece(parameter).copy_(whole)


def _piece(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
