"""A model as lm-eval sees one, and tasks from its library or from local files.

lm-eval makes the requests and the metrics; the model answers log-likelihoods of continuations and
of whole texts, and writes texts. It is installed by the extra `eval`.

Without a network a task's data come from a folder, `FOLDER/TASK/SPLIT.jsonl` (or `.json`,
`.parquet`, `.csv`), with the columns of the data set that the task names: what `to_json` of the
library `datasets` writes. Tasks of one's own are YAML files in lm-eval's format.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from fp8lm.evaluation.scoring import Passage, score_all, shared_out, windows
from fp8lm.generate.decoding import Decoding, complete
from fp8lm.generate.model import InferenceModel
from fp8lm.generate.sampling import Sampling
from fp8lm.runtime.errors import InputError

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
MOST_NEW_TOKENS = 256  # lm-eval's own default


class HarnessModel(TemplateLM):
    """`InferenceModel` behind lm-eval's interface; every rank is asked the same."""

    def __init__(self, model: InferenceModel, batch_size: int) -> None:
        super().__init__()
        self._model, self._batch_size = model, batch_size

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents, after which a text begins."""
        return self._model.tokenizer.eod

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._model.context_length

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others."""
        return "-".join(map(str, self._model.tokenizer.identity.values()))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of `string`; none is added."""
        return self._model.tokenizer.tokenize(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        passages = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"an answer has {len(continuation)} tokens, and the model's context "
                    f"{self.max_length} (model.max_position_embeddings): leave the task out"
                )
            # Of what is too long the beginning is left out, as in lm-eval's own models.
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            passages.append(Passage(tokens, min(len(continuation), len(tokens) - 1)))
        scores = score_all(self._model, passages, self._batch_size, "log-likelihoods")
        return [(-score.nats, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap."""
        passages: list[Passage] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            own = windows(tokens, self.eot_token_id, self.max_length, self.max_length)
            passages += own
            owners += [number] * len(own)
        totals = [0.0] * len(requests)
        scores = score_all(self._model, passages, self._batch_size, "rolling log-likelihoods")
        for number, score in zip(owners, scores, strict=True):
            totals[number] -= score.nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to a stop string or `max_gen_toks` tokens."""
        asked = [(request.args[0], request.args[1]) for request in requests]

        def of_batch(numbers: Sequence[int]) -> list[str]:
            return [self._write(*asked[number], number) for number in numbers]

        found = shared_out(self._model, range(len(asked)), 1, of_batch, "generation")
        return [found[number] for number in range(len(asked))]

    def _write(self, context: str, settings: dict[str, Any], number: int) -> str:
        until = settings.get("until") or []
        stops = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
        count = settings.get("max_gen_toks", MOST_NEW_TOKENS)
        samples = settings.get("do_sample", False)
        temperature = float(settings.get("temperature", 1.0)) if samples else 0.0
        sampling = Sampling(temperature, settings.get("top_k"), settings.get("top_p") or 1.0)
        room = max(1, self.max_length - count)
        tokens = (self.tok_encode(context) or [self.eot_token_id])[-room:]
        decoding = Decoding(sampling, count, stops)
        (done,) = complete(self._model, [tokens], decoding, first_number=number)
        return done.text


def evaluate_tasks(
    model: InferenceModel,
    tasks: Sequence[str],
    *,
    batch_size: int,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_folder: Path | None = None,
    task_data: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics by task (or group): `{"acc": .., "acc_stderr": .., "samples": ..}`.

    `task_folder` has task definitions of one's own, `task_data` local data (see the module).
    `limit` is in items per task. Raises `InputError` for a task that is unknown or whose data
    cannot be loaded.
    """
    with _loaded(tasks, task_folder, task_data) as found:
        results = simple_evaluate(
            HarnessModel(model, batch_size),
            tasks=found,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    assert results is not None  # it is None on other ranks than 0, as which all of ours pose
    samples = results.get("n-samples", {})
    return {
        name: {
            **_metrics(found),
            **({"samples": samples[name]["effective"]} if name in samples else {}),
        }
        for name, found in results["results"].items()
    }


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": ..}` without filters that say nothing."""
    numbers = {
        key.removesuffix(",none"): value
        for key, value in found.items()
        if isinstance(value, int | float) and "," in key
    }
    return {key: float(value) for key, value in numbers.items()}


@contextmanager
def _loaded(
    tasks: Sequence[str], task_folder: Path | None, task_data: Path | None
) -> Iterator[list[Any]]:
    """Tasks and groups of lm-eval's that names stand for."""
    managers = _managers(tasks, task_folder)
    if task_data is None:
        yield [item for task in tasks for item in _load(managers[task], task)]
        return
    _folder("--task-data", task_data)
    with tempfile.TemporaryDirectory(prefix="fp8lm-tasks-") as made:
        local = [task for task in tasks if (task_data / task).is_dir()]
        for task in local:
            definition = _with_local_data(managers[task], task, task_data / task)
            (Path(made) / f"{task}.yaml").write_text(yaml.safe_dump(definition))
        of_files = TaskManager(include_path=made, include_defaults=False)
        managers |= dict.fromkeys(local, of_files)
        yield [item for task in tasks for item in _load(managers[task], task)]


def _managers(tasks: Sequence[str], task_folder: Path | None) -> dict[str, TaskManager]:
    """What knows each of `tasks`: the folder, else lm-eval's thousands, which take seconds to read.

    `InputError` for a task that neither knows.
    """
    found: dict[str, TaskManager] = {}
    if task_folder is not None:
        _folder("--task-folder", task_folder)
        own = TaskManager(include_path=task_folder, include_defaults=False)
        found = {task: own for task in tasks if task in own.all_tasks}
    if left := [task for task in tasks if task not in found]:
        everything = TaskManager(include_path=task_folder)
        for task in left:
            _check_known(task, everything.all_tasks)
        found |= dict.fromkeys(left, everything)
    return found


def _check_known(task: str, known: list[str]) -> None:
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f": did you mean {near[0]}?" if near else ": lm-eval's list is `lm_eval ls tasks`"
        raise InputError(f"--tasks {task} is unknown{hint} (your own: --task-folder)")


def _load(manager: TaskManager, task: str) -> list[Any]:
    try:
        found = manager.load([task])
    except Exception as error:  # of datasets, its hub and task code: any kind
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"--tasks {task}: its data cannot be loaded ({first[0][:200]}); without a network give "
            f"them as files with --task-data FOLDER, in FOLDER/{task}/SPLIT.jsonl"
        ) from error
    return [*found["groups"].values()] or [*found["tasks"].values()]


def _folder(option: str, path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{option} {path} is no folder")
    return path


def _with_local_data(manager: TaskManager, task: str, folder: Path) -> dict[str, Any]:
    """The definition of `task` that reads the files in `folder`."""
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    kinds = {SUFFIXES[path.suffix] for path in files.values()}
    if len(kinds) != 1:
        raise InputError(f"--task-data: {folder} needs files of one kind: {', '.join(SUFFIXES)}")
    definition = manager.task_index[task].yaml_path
    if definition is None:
        raise InputError(f"--task-data: {task} is no task of a YAML file, whose data can be named")
    paths = {split: str(path.resolve()) for split, path in files.items()}
    return {
        "include": str(definition),
        "task": task,
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": paths},
    }
