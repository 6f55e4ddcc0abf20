"""Weights that stay zero: which elements of a parameter are trained, cut as the strategy cuts the parameter.

Such weights are zero when training starts (`run/masked.py` sees to it). With zero gradients too, none of the
optimizers moves them, whatever the momentum and the decay, and their state stays zero. Gradients are masked before
their norm is taken, so norms, clipping and LARS are those of the smaller network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from largescale.optim.lars import FlatLayout, local_piece


def own_piece(whole: Tensor, parameter: Tensor) -> Tensor:
    """This rank's piece of a tensor, cut as a parameter of the same shape is. Collectives: none.

    Args:
        whole: the same on all ranks.
        parameter: whole or a DTensor; the piece is on its device.
    """
    device = local_piece(parameter).device
    if isinstance(parameter, DTensor):
        cut = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        whole = cut.to_local()
    return whole.to(device)


def own_stretches(
    kept: Mapping[str, Tensor], names: Sequence[str], layouts: Mapping[Tensor, FlatLayout]
) -> dict[int, Tensor]:
    """What this rank holds of masks where parameters lie in flat tensors. Collectives: none.

    Args:
        kept: whole masks by names of parameters.
        names: of all parameters, in the order of the layouts.
        layouts: of the flat tensors; a parameter has at most one stretch in this rank's.

    Returns:
        Flat stretches by numbers of parameters, on the devices of the flat tensors.
    """
    stretches, first = {}, 0
    for flat, layout in layouts.items():
        for fragment in layout.fragments:
            number = first + fragment.parameter
            if (whole := kept.get(names[number])) is not None:
                stretches[number] = whole.flatten().narrow(0, fragment.start, fragment.numel).to(flat.device)
        first += len(layout.shapes)
    return stretches
