"""The checkpoints of a run: saving, resuming and rolling back.

A checkpoint that cannot be written does not end the training: it is reported, the one before it is
intact, and the next is tried when it is due. The last one of a run must be written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fp8lm.checkpoint import (
    Checkpoint,
    CheckpointSaver,
    Outcome,
    Retention,
    check_save_folder,
    claim_save_dir,
    find_checkpoint,
    open_checkpoint,
)
from fp8lm.checkpoint.collectives import all_or_error, on_main
from fp8lm.checkpoint.files import SET_ASIDE, delete_after
from fp8lm.checkpoint.location import load_problem, locate, pretrained_problem
from fp8lm.data.reference_losses import read_metadata
from fp8lm.metrics.console import saved_line
from fp8lm.runtime.errors import InputError, LockLost
from fp8lm.runtime.run_lock import RunLocks
from fp8lm.training import pretrained
from fp8lm.training.config_diff import (
    changed_keys,
    changed_layout,
    check_same_model,
    check_same_objective,
)
from fp8lm.training.provenance import (
    check_log_probs,
    check_same_reference,
    check_same_tokenizer,
    digest_of,
    made_with,
    replaced_data,
)
from fp8lm.training.state import by_name
from fp8lm.training.train_state import NEEDED, TrainState


class RunCheckpoints:
    """Saves and loads `state`; every method is a collective of all ranks.

    Nothing is read or made before `open`. `report` takes a line of text; `locks` are those of the
    run's folders.
    """

    def __init__(
        self, state: TrainState, report: Callable[[str], None], locks: RunLocks | None = None
    ) -> None:
        self._state, self._report = state, report
        self._run, self._progress = state.run, state.progress
        self._config, self._group = state.run.config.checkpoint, state.run.groups.saving
        self._locks = RunLocks() if locks is None else locks
        self._saver: CheckpointSaver | None = None
        self._made_with: dict[str, Any] = {}
        # Of initial weights, until others are read.
        self._reference_identity: dict[str, Any] = {"seed": state.run.config.train.seed}
        self._began_at: Checkpoint | None = None
        self._saved_iteration: int | None = None
        self.is_open = False

    @property
    def reference_identity(self) -> Mapping[str, Any]:
        """Which weights the run has started from."""
        return self._reference_identity

    def open(self) -> None:
        """Check `checkpoint.load` and `checkpoint.save`: now, not after hours of training.

        `InputError` for an unusable folder.
        """
        config, run = self._config, self._run
        if config.save is not None or config.load is not None:
            # Data files may be replaced during the run: this is what this start reads.
            self._made_with = on_main(self._group, lambda: made_with(run.config, run.tokenizer))
        if problem := on_main(
            self._group, lambda: load_problem(config) or pretrained_problem(config)
        ):
            raise InputError(problem)
        if config.save is not None:
            on_main(self._group, self._locks.verify)
            check_save_folder(config.save, self._group)
            self._locks.heartbeat()  # a full disk, cleared up now, may have left the record empty
            self._saver = CheckpointSaver(
                config.save,
                self._group,
                asynchronous=config.async_save,
                retention=Retention(config.keep_last, config.save_retain_interval),
                locks=self._locks,
                files=run.tokenizer.files,
                training_group=run.groups.world,
            )
        self.is_open = True

    def load(self) -> None:
        """Resume from `checkpoint.load`: a checkpoint, or a folder whose newest valid one is taken.

        A folder without checkpoints starts a new run if it is `checkpoint.save` too, so that one
        command starts and resumes. A new run starts from the weights of `checkpoint.pretrained`,
        else from initial ones. Raises `InputError` for any other folder without checkpoints, for a
        checkpoint that does not fit this model, and if `checkpoint.save` holds another run's.
        """
        folder, weights = self._config.load, self._config.pretrained
        found = None if folder is None else self._find(folder, NEEDED)
        if weights is not None and (found is None or self._run.reference is not None):
            self._start_from(weights, only_reference=found is not None)
        elif weights is not None:
            self._report(f" not read, since this run resumes: checkpoint.pretrained={weights}")
        elif folder is not None and found is None:
            self._report(f" no checkpoint in {folder}: starting from initial weights")
        self._keep_reference(is_new=found is None)
        if found is not None:
            self._go_on_from(found)
        if self._saver is not None:
            self._claim_save_dir(self._saver.root, 0 if found is None else found.iteration)

    def _find(self, folder: str, needed: Collection[str]) -> Checkpoint | None:
        root, iteration = on_main(self._group, lambda: locate(folder))
        if iteration is not None:
            return open_checkpoint(root, iteration, self._group, needed=needed)
        found = find_checkpoint(root, self._group, needed=needed)
        for problem in found.passed_over if found is not None else ():
            self._report(f" warning: passed over a checkpoint: {problem}")
        return found

    def _keep_reference(self, *, is_new: bool) -> None:
        """Copy the weights that a run of preferences starts from, before it goes on from others."""
        config = self._run.config
        if (reference := self._run.reference) is None:
            if (path := config.tuning.reference_logprobs) is not None:
                if is_new:
                    check_log_probs(config, self._reference_identity)
                self._made_with["reference"] = read_metadata(path)["reference"]
            return
        self._run.data_parallel.finish_param_sync()
        reference.copy_weights(self._run.weights)
        self._made_with["reference"] = self._reference_identity

    def _start_from(self, folder: str, *, only_reference: bool = False) -> None:
        try:
            found = self._find(folder, pretrained.NEEDED)
            if found is None:  # there was one when the run began
                raise InputError(f"no checkpoint in {folder}")
            lines = pretrained.start_from_weights(self._run, found, self._group)
        except InputError as error:
            raise InputError(f"checkpoint.pretrained = {folder}: {error}") from error
        self._reference_identity = {"sha256": on_main(self._group, lambda: digest_of(found))}
        where = f"{found.folder.parent}, iteration {found.iteration}"
        if only_reference:
            self._report(f" reference: the weights of checkpoint.pretrained: {where}")
            return
        self._report(f" new run from the weights of checkpoint.pretrained: {where}")
        for line in lines:
            self._report(f" {line}")

    def _go_on_from(self, found: Checkpoint) -> None:
        former, config = found.common["config"], self._run.config.model_dump(mode="json")
        check_same_model(former, config, found.folder)
        check_same_objective(former, config, found.folder)
        check_same_reference(found, self._made_with)
        tokenizer_changed = all_or_error(
            self._group, lambda: check_same_tokenizer(found, self._run.tokenizer, self._config)
        )
        changed = changed_keys(former, config)
        try:
            reader = self._state.fill(found)
        except InputError as error:
            if not (changed := [*changed, *changed_layout(former, config)]):
                raise
            raise InputError(f"{error}; changed since then: {', '.join(changed)}") from error
        self._began_at = found
        self._saved_iteration = found.iteration if self._config.resumes else None
        root = found.folder.parent
        self._report(f" loaded checkpoint of iteration {found.iteration} from {root}")
        for line in (*tokenizer_changed, *replaced_data(found.common, self._made_with)):
            self._report(f" warning: {line}")
        if reader.converted:
            self._report(f" converted: {', '.join(reader.converted)}")
        if reader.extended:
            self._report(f" extended with initial values: {', '.join(reader.extended)}")
        if changed:
            self._report(f" note: changed since that checkpoint: {', '.join(changed)}")

    def _claim_save_dir(self, root: Path, iteration: int) -> None:
        moved = claim_save_dir(root, iteration, self._config.resumes, self._group)
        if moved:
            iterations = ", ".join(map(str, reversed(moved)))
            self._report(
                f" warning: checkpoints {iterations} are newer than the one being resumed "
                f"({iteration}): moved to {root / SET_ASIDE}"
            )

    def save(self) -> None:
        """Begin a checkpoint, unless this iteration has one."""
        if self._saver is None or self._saved_iteration == self._progress.iteration:
            return
        shards = by_name(self._state.shards_to_write())
        facts = {**self._state.facts(), **self._made_with}
        self._saver.save(self._progress.iteration, shards, facts)
        self._saved_iteration = self._progress.iteration

    def tell(self) -> None:
        """Report saves that have finished or failed since the last call."""
        for outcome in self._saver.collect() if self._saver is not None else ():
            self._tell_written(outcome)
            if not outcome.written:
                self._saved_iteration = None
                if not isinstance(outcome.error, LockLost):  # for which all ranks will stop
                    self._report(f" warning: {outcome.error}; the training goes on")

    def _tell_written(self, outcome: Outcome) -> None:
        if outcome.written:
            self._report(saved_line(outcome.iteration, self._config.save or ""))
            if outcome.error is not None:
                self._report(f" warning: {outcome.error}")

    def finish(self) -> None:
        """Save and wait until the checkpoint is on disk; raises the error if that fails."""
        if self._saver is None:
            return
        self._saver.wait()
        self.tell()
        self.save()
        self._saver.close()
        for outcome in self._saver.collect():
            if outcome.error is not None and not outcome.written:
                raise outcome.error
            self._tell_written(outcome)

    def wait(self) -> None:
        """Wait until no checkpoint is being written, and report the last one."""
        if self._saver is not None:
            self._saver.wait()
            self.tell()

    def _saver_to_rewind(self) -> CheckpointSaver:
        """The saver of `checkpoint.save`, which the config requires for rollbacks."""
        if self._saver is None:
            raise RuntimeError("going back needs checkpoint.save")
        return self._saver

    def find_before(self, iteration: int) -> Checkpoint | None:
        """The newest valid checkpoint before `iteration`: of this run, or the one it started from.

        None if there is none.
        """
        self.wait()
        newest = {self._saver_to_rewind().root: iteration - 1}
        if (began := self._began_at) is not None:
            newest.setdefault(began.folder.parent, min(iteration - 1, began.iteration))
        for folder, up_to in newest.items():
            try:
                found = find_checkpoint(folder, self._group, up_to=up_to, needed=NEEDED)
            except InputError as error:
                self._report(f" warning: {error}")
                continue
            if found is not None:
                return found
        return None

    def rewind(self, checkpoint: Checkpoint) -> None:
        """Return to `checkpoint`, and delete newer ones of this run."""
        root, iteration = self._saver_to_rewind().root, checkpoint.iteration
        own = checkpoint.folder.parent == root
        try:
            on_main(self._group, self._locks.verify)
            on_main(self._group, lambda: delete_after(root, iteration if own else 0))
        except OSError as error:  # one that stays is replaced when its iteration comes again
            self._report(f" warning: newer checkpoints than {iteration} cannot be deleted: {error}")
        self._state.fill(checkpoint)
        self._saved_iteration = iteration if own else None
