"""Settings of a crop group that differ from `data.augment`."""

from __future__ import annotations

from copy import deepcopy

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from largescale.config.data_settings import AugmentConfig, DataConfig
from shards.ground.errors import InputError


def augment_of_group(data: DataConfig, place: int) -> AugmentConfig:
    """How views of a crop group are augmented: as `data.augment` says, but for what the group sets itself.

    Raises:
        InputError: a key that `data.augment` does not have, or a value of another type.
    """
    own = data.crops[place].augment
    if not own:
        return deepcopy(data.augment)
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(data.augment), own))
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(
            f"data.crops[{place}].augment={own}: expected keys and values of data.augment "
            f"({str(error).splitlines()[0]})"
        ) from error
    assert isinstance(merged, AugmentConfig)
    return merged
