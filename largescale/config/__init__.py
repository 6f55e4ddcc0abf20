"""The configuration: `schema` says what can be set, `loading` reads it, `checks` refuses what cannot work."""

from largescale.config.checks import free_keys, values_saved_before, without_effect
from largescale.config.data_settings import AugmentConfig, CropGroup, DataConfig
from largescale.config.frame_settings import FrameConfig, WantedFrames
from largescale.config.group_augment import augment_of_group
from largescale.config.loading import load_config
from largescale.config.model_settings import ModelConfig
from largescale.config.schema import (
    PRECISIONS,
    CheckpointConfig,
    Config,
    EvaluateConfig,
    MethodConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from largescale.config.sound_settings import SoundConfig
from largescale.config.support_settings import SupportConfig
from largescale.config.values import (
    corpus_names,
    corpus_settings,
    flatten,
    require,
    to_yaml,
    with_present_names,
    without_later_defaults,
)

__all__ = [
    "PRECISIONS",
    "AugmentConfig",
    "CheckpointConfig",
    "Config",
    "CropGroup",
    "DataConfig",
    "EvaluateConfig",
    "FrameConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "SoundConfig",
    "SupportConfig",
    "TrainConfig",
    "WantedFrames",
    "augment_of_group",
    "corpus_names",
    "corpus_settings",
    "flatten",
    "free_keys",
    "load_config",
    "require",
    "to_yaml",
    "values_saved_before",
    "with_present_names",
    "without_effect",
    "without_later_defaults",
]
