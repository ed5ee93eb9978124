"""A model as lm-eval sees one, and tasks from its library or from local files.

lm-eval makes the requests and the metrics; the model answers log-likelihoods of continuations and
of whole texts, and writes texts. It is installed by the extra `eval`.

Without a network a task's data come from a folder, `FOLDER/TASK/SPLIT.jsonl` (or `.json`,
`.parquet`, `.csv`), with the columns of the data set that the task names: what `to_json` of the
library `datasets` writes. Tasks of one's own are YAML files in lm-eval's format.
"""

from __future__ import annotations

import copy
import difflib
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lm_eval import evaluate
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from fp8lm.checkpoint.collectives import on_main
from fp8lm.evaluation.scoring import Passage, score_all, shared_out, windows
from fp8lm.generate.decoding import Decoding, complete
from fp8lm.generate.model import InferenceModel
from fp8lm.generate.sampling import Sampling
from fp8lm.runtime.errors import InputError

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
# lm-eval's own defaults.
MOST_NEW_TOKENS = 256
SEED = 1234
BOOTSTRAP_ITERS = 1000  # a hundredth of the default: errors of metrics that are no means


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


@dataclass(frozen=True)
class TaskSource:
    """Names of tasks and groups, and where they are beside lm-eval's own.

    `folder` has task definitions of one's own, `data` local data (see the module). `num_fewshot`
    replaces what a task says, unless that is 0. `said` are the names under which a user gave
    `names`, `folder` and `data`.
    """

    names: Sequence[str]
    folder: Path | None = None
    data: Path | None = None
    num_fewshot: int | None = None
    said: tuple[str, str, str] = ("--tasks", "--task-folder", "--task-data")


class Tasks:
    """Tasks with their data, loaded once and evaluated as often as is wanted."""

    def __init__(self, loaded: Sequence[Task | Group], num_fewshot: int | None) -> None:
        found = TaskManager(include_defaults=False).load(list(loaded))
        self._tasks, self._groups = found["tasks"], found["groups"]
        for task in self._tasks.values():
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config("num_fewshot", num_fewshot or 0)

    @classmethod
    def load(cls, source: TaskSource) -> Tasks:
        """`InputError` for a task that is unknown or whose data cannot be loaded."""
        return cls(_load_all(source), source.num_fewshot)

    def evaluate(
        self, model: InferenceModel, *, batch_size: int, limit: int | None = None
    ) -> dict[str, dict[str, float]]:
        """Metrics by task (or group): `{"acc": .., "acc_stderr": .., "samples": ..}`.

        `limit` is in items per task. A collective of all ranks; all get the metrics of the first.
        """
        # Copies, which the requests are gone with.
        tasks = {name: copy.copy(task) for name, task in self._tasks.items()}
        with seeded(SEED, model.device):
            for task in tasks.values():
                task.set_fewshot_seed(SEED)
            found = evaluate(
                HarnessModel(model, batch_size),
                {"tasks": tasks, "groups": self._groups},
                limit=limit,
                bootstrap_iters=BOOTSTRAP_ITERS,
                log_samples=False,
            )
        assert found is not None  # it is None on other ranks than 0, as which all of ours pose
        samples = found["n-samples"]
        counts = {name: {"samples": float(of["effective"])} for name, of in samples.items()}
        metrics = {
            name: {**_metrics(of_task), **counts.get(name, {})}
            for name, of_task in found["results"].items()
        }
        return on_main(model.groups.world, lambda: metrics)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators, whose states come back afterwards."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """`{"acc,none": 0.5, "acc_stderr,none": ..}` without filters that say nothing."""
    numbers = {
        key.removesuffix(",none"): value
        for key, value in found.items()
        if isinstance(value, int | float) and "," in key
    }
    return {key: float(value) for key, value in numbers.items()}


def _load_all(source: TaskSource) -> list[Any]:
    """Tasks and groups of lm-eval's that names stand for."""
    managers = _managers(source)
    with tempfile.TemporaryDirectory(prefix="fp8lm-tasks-") as made:
        if source.data is not None:
            data = _folder(source.said[2], source.data)
            local = [task for task in source.names if (data / task).is_dir()]
            for task in local:
                definition = _with_local_data(managers[task], task, source)
                (Path(made) / f"{task}.yaml").write_text(yaml.safe_dump(definition))
            managers |= dict.fromkeys(local, TaskManager(include_path=made, include_defaults=False))
        return [item for task in source.names for item in _load(managers[task], task, source)]


def _managers(source: TaskSource) -> dict[str, TaskManager]:
    """What knows each task: the folder, else lm-eval's thousands, which take seconds to read.

    `InputError` for a task that neither knows.
    """
    found: dict[str, TaskManager] = {}
    if source.folder is not None:
        _folder(source.said[1], source.folder)
        own = TaskManager(include_path=source.folder, include_defaults=False)
        found = {task: own for task in source.names if task in own.all_tasks}
    if left := [task for task in source.names if task not in found]:
        everything = TaskManager(include_path=source.folder)
        for task in left:
            _check_known(task, everything.all_tasks, source)
        found |= dict.fromkeys(left, everything)
    return found


def _check_known(task: str, known: list[str], source: TaskSource) -> None:
    if task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        hint = f": did you mean {near[0]}?" if near else ": lm-eval's list is `lm_eval ls tasks`"
        names, folder, _ = source.said
        raise InputError(f"{names} {task} is unknown{hint} (your own: {folder})")


def _load(manager: TaskManager, task: str, source: TaskSource) -> list[Any]:
    try:
        found = manager.load([task])
    except Exception as error:  # of datasets, its hub and task code: any kind
        first = str(error).strip().splitlines() or [type(error).__name__]
        names, _, data = source.said
        raise InputError(
            f"{names} {task}: its data cannot be loaded ({first[0][:200]}); without a network give "
            f"them as files with {data} FOLDER, in FOLDER/{task}/SPLIT.jsonl"
        ) from error
    return [*found["groups"].values()] or [*found["tasks"].values()]


def _folder(option: str, path: Path) -> Path:
    if not path.is_dir():
        raise InputError(f"{option} {path} is no folder")
    return path


def _with_local_data(manager: TaskManager, task: str, source: TaskSource) -> dict[str, Any]:
    """The definition of `task` that reads the files in its folder of `source.data`."""
    option, folder = source.said[2], Path(source.data or "", task)
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}
    kinds = {SUFFIXES[path.suffix] for path in files.values()}
    if len(kinds) != 1:
        raise InputError(f"{option}: {folder} needs files of one kind: {', '.join(SUFFIXES)}")
    definition = manager.task_index[task].yaml_path
    if definition is None:
        raise InputError(f"{option}: {task} is no task of a YAML file, whose data can be named")
    paths = {split: str(path.resolve()) for split, path in files.items()}
    return {
        "include": str(definition),
        "task": task,
        "dataset_path": kinds.pop(),
        "dataset_name": None,
        "dataset_kwargs": {"data_files": paths},
    }
