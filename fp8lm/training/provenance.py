"""Identity of a model's tokenizer and data, by content.

A path says little: what lies at it may have been replaced. Checkpoints carry the identity of both,
and the tokenizer's files. On resume another tokenizer is an error, since its ids mean other text to
the weights; other data are a warning, since a run may well go on with others.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fp8lm.checkpoint import Checkpoint
from fp8lm.checkpoint.checksums import CHECKSUMS, file_digest
from fp8lm.checkpoint.facts import LARGEST_COMMON, parse_common
from fp8lm.checkpoint.files import COMMON, find_folder, latest_iteration
from fp8lm.checkpoint.location import locate
from fp8lm.config import CheckpointConfig, Config
from fp8lm.data.examples import data_identity
from fp8lm.data.identity import differences
from fp8lm.data.reference_losses import KEY, TOOL, read_metadata
from fp8lm.data.tokenizer import Tokenizer, tokenizer_from_files
from fp8lm.data.tokenizer_files import TEMPLATE
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.files import read_regular
from fp8lm.training.resizing import EXTEND

_COMPARED_IDS = 1000


def made_with(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The facts on tokenizer and data in a checkpoint's `common.json`."""
    paths = () if config.data.mock_data else config.data.data_path or ()
    entries = [entry for entry in paths if isinstance(entry, str)]
    return {
        "tokenizer": {"identity": dict(tokenizer.identity), "files": sorted(tokenizer.files)},
        "data": [{"prefix": entry, "identity": data_identity(entry)} for entry in entries],
    }


def check_same_tokenizer(
    checkpoint: Checkpoint, tokenizer: Tokenizer, config: CheckpointConfig
) -> list[str]:
    """A line on an allowed change since `checkpoint`; none if nothing has changed.

    Raises `InputError` for any other change. A checkpoint that names no tokenizer passes.
    """
    recorded = (checkpoint.common.get("tokenizer") or {}).get("identity")
    if not recorded or not (changed := differences(recorded, tokenizer.identity)):
        return []
    former, num_ids = recorded["vocab_size"], tokenizer.vocab_size
    what = f"another tokenizer than that of {checkpoint.folder}: {', '.join(changed)} differs"
    if former != num_ids:
        what = f"{what}: {num_ids} tokens, and the checkpoint has {former}"
    if config.extend_embeddings and num_ids > former:
        _check_common_ids(checkpoint, former, tokenizer)
    elif not config.allow_tokenizer_change:
        cure = "set checkpoint.allow_tokenizer_change=true if that is meant"
        if num_ids > former:
            cure = EXTEND
        raise InputError(f"{what}: {cure}; {_where(checkpoint.folder, checkpoint.common)}")
    return [what]


def kept_tokenizer(config: CheckpointConfig) -> str | None:
    """Where the checkpoint that a run would go on or start from keeps its tokenizer, if anywhere.

    For a message: nothing but the facts is read, and nothing checked.
    """
    for path in filter(None, (config.load, config.pretrained)):
        try:
            root, iteration = locate(path)
            iteration = latest_iteration(root) if iteration is None else iteration
            folder = None if iteration is None else find_folder(root, iteration)
            if folder is None:
                continue
            common = parse_common(read_regular(folder / COMMON, LARGEST_COMMON), ("tokenizer",))
        except (InputError, OSError, ValueError):
            return None
        return _where(folder, common) if common["tokenizer"].get("files") else None
    return None


def _where(folder: Path, common: Mapping[str, Any]) -> str:
    files = [file for file in common["tokenizer"].get("files") or () if file != TEMPLATE]
    if not files:
        return "it had no files"
    name = folder / files[0] if len(files) == 1 else folder
    return f"the checkpoint's own is tokenizer.tokenizer_model={name}"


def _check_common_ids(checkpoint: Checkpoint, former: int, tokenizer: Tokenizer) -> None:
    """Raise `InputError` if ids below `former` mean other text than to the checkpoint."""
    own = tokenizer_of(checkpoint)
    if own is None:  # ids that are their own text
        return
    for number in range(0, former, max(1, former // _COMPARED_IDS)):
        texts = [one.detokenize([number]) for one in (own, tokenizer)]
        if texts[0] != texts[1]:
            raise InputError(
                f"the tokenizer does not extend that of {checkpoint.folder}: id {number} is "
                f"{texts[1]!r} and was {texts[0]!r}: use one that keeps the ids there are"
            )


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """The tokenizer whose files `checkpoint` carries; None if it carries none."""
    recorded = checkpoint.common.get("tokenizer")
    if not recorded or not recorded.get("files"):
        return None
    identity, files = recorded["identity"], recorded["files"]
    contents = {name: checkpoint.read_file(name) for name in files}
    kind, of_null = identity["tokenizer_type"], identity["vocab_size"] - 1
    return tokenizer_from_files(kind, contents, of_null, source=f"in {checkpoint.folder}")


def replaced_data(former: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """A line for each token file that has other content than when a checkpoint was written."""
    recorded = {file["prefix"]: file["identity"] for file in former.get("data") or ()}
    return [
        f"{file['prefix']} holds other tokens than when the checkpoint was written: the samples "
        "from here on are of the new data, counted on from the old"
        for file in present["data"]
        if _differs(recorded.get(file["prefix"], {}), file["identity"])
    ]


def digest_of(checkpoint: Checkpoint) -> str:
    """SHA-256 of a checkpoint's list of checksums: of all that it holds."""
    return file_digest(checkpoint.folder / CHECKSUMS)


def check_same_reference(checkpoint: Checkpoint, present: Mapping[str, Any]) -> None:
    """Raise `InputError` where a run of preferences would go on with another reference model."""
    was, now = checkpoint.common.get("reference"), present.get("reference")
    if was is not None and was != now:
        raise InputError(
            f"{checkpoint.folder} was trained against another reference model: give the "
            "checkpoint.pretrained (or the seed, or the file of tuning.reference_logprobs) that it "
            "has started from"
        )


def check_log_probs(config: Config, identity: Mapping[str, Any]) -> None:
    """Raise `InputError` for log-probabilities of another model than a run starts from."""
    path = config.tuning.reference_logprobs
    if path is not None and read_metadata(path)["reference"] != identity:
        raise InputError(
            f"{KEY} = {path} is of another model than the one that this run starts from "
            f"(checkpoint.pretrained = {config.checkpoint.pretrained}): {TOOL} again"
        )


def _differs(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return any(one[field] != two[field] for field in one.keys() & two.keys())
