"""Starting a new run from the weights of a checkpoint (`checkpoint.pretrained`).

weight, master    what a run that resumes under this config would read (see `conversion`): the
                  checkpoint's own bytes where formats agree, else cast from its master, or from
                  its weight where it has none
moments           zero, as are the step count, the iteration and what is consumed of the data
"""

from __future__ import annotations

from fp8lm.checkpoint import Checkpoint
from fp8lm.checkpoint.collectives import Group, all_or_error
from fp8lm.optim import AdamW
from fp8lm.runtime.errors import InputError
from fp8lm.training.build import Run
from fp8lm.training.config_diff import changed_keys, check_same_model
from fp8lm.training.provenance import check_same_tokenizer
from fp8lm.training.resizing import Vocabulary
from fp8lm.training.state import model_shards, optimizer_shards
from fp8lm.training.state_reader import StateReader

NEEDED = ("config", "config.model")  # facts that tell what the weights mean
KINDS = ("weight", "master")


def start_from_weights(run: Run, found: Checkpoint, group: Group) -> list[str]:
    """Give `run` the weights of `found`; lines that say how they differ. A collective of all ranks.

    `run` has not trained. Raises `InputError` before anything is filled for weights of another
    model or another tokenizer.
    """
    config = run.config
    former, own = found.common["config"], config.model_dump(mode="json")
    try:
        check_same_model(former, own, found.folder)
        lines = all_or_error(
            group, lambda: check_same_tokenizer(found, run.tokenizer, config.checkpoint)
        )
        reader = _fill(run, found, group)
    except InputError as error:
        keys = [line for line in changed_keys(former, own) if line.startswith("model.")]
        cure = f"; set section model as it was there: {', '.join(keys)}" if keys else ""
        raise InputError(f"{error}{cure}") from error
    measure_amax(run.optimizer)
    lines = [f"warning: {line}" for line in lines]
    if reader.converted:
        lines.append(f"converted: {', '.join(reader.converted)}")
    if reader.extended:
        lines.append(f"extended with initial values: {', '.join(reader.extended)}")
    return lines


def _fill(run: Run, found: Checkpoint, group: Group) -> StateReader:
    run.data_parallel.finish_param_sync()
    vocabulary = Vocabulary.of(run.tokenizer.vocab_size, found.common)
    extend = run.config.checkpoint.extend_embeddings
    reader = StateReader(run.optimizer, found, vocabulary, extend, group, KINDS)
    states = optimizer_shards(run.optimizer).items()
    masters = {key: shards for key, shards in states if key.kind == "master"}
    # Every tensor of the stored model must be used: a model of fewer layers would load, too.
    weights = {str(key) for key in found.state if key.kind == "weight"}
    reader.read({**model_shards(run.weights), **masters}, found.tensors.keys() - weights)
    return reader


def measure_amax(optimizer: AdamW) -> None:
    """Set `AdamW.amax` to that of the masters as they are now; a collective of all ranks."""
    for row, name in enumerate(optimizer.weights):
        optimizer.amax[row, 0] = 0.0
        if (state := optimizer.states.get(name)) is not None and state.master.payload.numel():
            kernels = optimizer.kernels
            optimizer.amax[row, 0] = kernels.amax(kernels.dequantize(state.master))
    optimizer.share_amax()
