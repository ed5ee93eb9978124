"""Sharded checkpoints that load under any layout, written atomically and verified before use."""

from fp8lm.checkpoint.background import CheckpointSaver, Outcome
from fp8lm.checkpoint.files import Retention, latest_iteration
from fp8lm.checkpoint.loading import (
    Checkpoint,
    DamagedCheckpoint,
    find_checkpoint,
    load_checkpoint,
    open_checkpoint,
)
from fp8lm.checkpoint.save_folder import check_save_folder, claim_save_dir
from fp8lm.checkpoint.saving import RetentionError, SaveError, save_checkpoint
from fp8lm.checkpoint.shard import Shard
from fp8lm.checkpoint.state_key import StateKey

__all__ = [
    "Checkpoint",
    "CheckpointSaver",
    "DamagedCheckpoint",
    "Outcome",
    "Retention",
    "RetentionError",
    "SaveError",
    "Shard",
    "StateKey",
    "check_save_folder",
    "claim_save_dir",
    "find_checkpoint",
    "latest_iteration",
    "load_checkpoint",
    "open_checkpoint",
    "save_checkpoint",
]
