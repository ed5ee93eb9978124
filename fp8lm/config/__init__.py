"""Typed, frozen, validated configuration: YAML files with inheritance, and dotted overrides."""

from fp8lm.config.command_line import parse_command_line
from fp8lm.config.loading import build_config, load_config
from fp8lm.config.model import ModelConfig
from fp8lm.config.parallel import ParallelConfig
from fp8lm.config.precision import PRESETS, PrecisionConfig
from fp8lm.config.root import Config
from fp8lm.config.storage import CheckpointConfig, DataConfig, LoggingConfig, TokenizerConfig
from fp8lm.config.training import OptimizerConfig, SchedulerConfig, TrainConfig
from fp8lm.config.tuning import TuningConfig

__all__ = [
    "PRESETS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PrecisionConfig",
    "SchedulerConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TuningConfig",
    "build_config",
    "load_config",
    "parse_command_line",
]
