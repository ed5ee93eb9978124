"""The complete training state of a checkpoint, as one object to save and to load into."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fp8lm.checkpoint import Checkpoint, Shard, StateKey
from fp8lm.runtime.errors import InputError
from fp8lm.telemetry.guard import Guard
from fp8lm.training.build import Run
from fp8lm.training.progress import MetricAccumulator, Progress
from fp8lm.training.resizing import Vocabulary
from fp8lm.training.spikes import LossSpikeDetector
from fp8lm.training.state import (
    StateShards,
    history_shards,
    model_shards,
    optimizer_shards,
    stored_histories,
)
from fp8lm.training.state_reader import StateReader

# Facts that resuming needs.
NEEDED = (
    "consumed_samples",
    "batch_size",
    "skipped_samples",
    "rollbacks",
    "losses",
    "config",
    "config.model",
    "config.train",
)


@dataclass(frozen=True)
class TrainState:
    """Model and optimizer of `run`, sums since the last report, position, and loss history.

    `guard`: which layers run in BF16, if the run has one.
    """

    run: Run
    window: MetricAccumulator
    progress: Progress
    losses: LossSpikeDetector
    guard: Guard | None = None

    def shards(self) -> StateShards:
        """This rank's blocks of all tensors."""
        mus = self.run.data_parallel.named_tensors()
        return {
            **model_shards(self.run.weights),
            **optimizer_shards(self.run.optimizer),
            StateKey("window"): [Shard.whole(self.window.sums)],
            **{StateKey("mu", name): [Shard.whole(mu)] for name, mu in mus.items()},
            **history_shards(self.run.histories),
        }

    def shards_to_write(self) -> StateShards:
        """Those that this rank offers, complete; a collective of all ranks."""
        self.run.optimizer.share_amax()
        self.run.data_parallel.finish_param_sync()
        # A table that two stages have is cut into rows by each in its own way: one writes it.
        shared = self.run.shared_params
        return {key: own for key, own in self.shards().items() if key.param not in shared}

    def facts(self) -> dict[str, Any]:
        """The facts, for `common.json`."""
        return {
            **asdict(self.progress),
            "losses": self.losses.state,
            **({} if self.guard is None else {"guard": self.guard.state}),
            "config": self.run.config.model_dump(mode="json"),
        }

    def fill(self, checkpoint: Checkpoint) -> StateReader:
        """Load `checkpoint`; returns what had to be converted or extended.

        A collective of all ranks. `InputError` for one that does not fit.
        """
        run, common = self.run, checkpoint.common
        if common.get("released"):
            raise InputError(
                f"{checkpoint.folder} is a release, without optimizer states: resume from the "
                "checkpoint that it was made of, or start a new run with checkpoint.pretrained="
                f"{checkpoint.folder.parent} in place of checkpoint.load"
            )
        run.data_parallel.finish_param_sync()
        vocabulary = Vocabulary.of(run.tokenizer.vocab_size, common)
        extend = run.config.checkpoint.extend_embeddings
        reader = StateReader(run.optimizer, checkpoint, vocabulary, extend, run.groups.saving)
        unused = [str(key) for key in checkpoint.state if key.kind in ("mu", "amax_history")]
        run.histories.clear()
        reader.read(self._expected_in(checkpoint), unused=unused)
        run.histories.refresh()
        for name in asdict(self.progress):
            setattr(self.progress, name, common[name])
        self.losses.restore(common["losses"])
        if self.guard is not None:
            self.guard.restore(common.get("guard"))
        return reader

    def _expected_in(self, checkpoint: Checkpoint) -> StateShards:
        # A reduction without mu passes over what another stored; one that finds none starts anew.
        # The whole job's tensors tell: a stage may have none.
        shards, kinds = self.shards(), {key.kind for key in checkpoint.state}
        histories = stored_histories(self.run.histories, checkpoint)
        absent = {"mu", "amax_history"} - (kinds & {"mu"})
        return {key: own for key, own in shards.items() if key.kind not in absent} | histories
