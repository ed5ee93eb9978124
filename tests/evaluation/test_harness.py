"""Tasks through lm-eval: its own Hugging Face model gives the same, item by item."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from fp8lm.evaluation.harness import HarnessModel, Tasks, TaskSource
from fp8lm.runtime.errors import InputError
from tests.evaluation.tasks import TASKS, save_model, write_tasks
from tests.generate.models import loaded

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of several precisions by name, and tasks of 200 items and of 30."""
    root = tmp_path_factory.mktemp("harness")
    for precision in ("fp32", "o3"):
        (root / precision).mkdir()
        save_model(root / precision, precision)
    write_tasks(root / "many", 200)
    write_tasks(root / "few", 30)
    return root


@pytest.fixture
def reference(folder, tmp_path):
    """The FP32 model, and lm-eval's own model of `transformers` that reads its export."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from tests.evaluation.hugging_face import exported, tokenizer_of

    other = exported(folder / "fp32" / "ck", tmp_path / "hf")
    tokenizer = tokenizer_of(tmp_path / "hf")
    with loaded(folder / "fp32" / "ck") as model:
        ours = HarnessModel(model, batch_size=8)
        # A text begins after the token that ends documents, as in training. Without its cache,
        # which takes scores of one split of a text for those of another.
        settings = {"prefix_token_id": ours.eot_token_id, "logits_cache": False}
        theirs = HFLM(other, tokenizer=tokenizer, max_length=48, batch_size=1, **settings)
        yield ours, theirs


def requests(kind, arguments):
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def items(folder):
    text = (folder / "many" / "data" / "choices" / "test.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_log_likelihoods_of_200_items_agree(folder, reference):
    pairs = [
        (item["question"] + " ", choice) for item in items(folder) for choice in item["choices"]
    ]
    pairs += [
        ("", "def return"),
        ("x" * 100, " yield"),
        ("a" * 30, "y" * 40),
    ]  # longer than the context
    ours, theirs = (m.loglikelihood(requests("loglikelihood", pairs)) for m in reference)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], rel=1e-4)


def test_an_answer_longer_than_the_context(folder):
    with loaded(folder / "o3" / "ck") as model, pytest.raises(InputError, match="49 tokens"):
        HarnessModel(model, 1).loglikelihood(requests("loglikelihood", [("a", "y" * 49)]))


def test_rolling_log_likelihoods_agree(folder, reference):
    texts = [(item["question"] * 4,) for item in items(folder)[:40]]
    ours, theirs = (
        m.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for m in reference
    )
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_texts_agree(folder, reference):
    settings = {"until": ["\n", "def"], "max_gen_toks": 8, "do_sample": False}
    asked = [(item["question"], dict(settings)) for item in items(folder)[:10]]
    asked.append(("return " * 60, dict(settings)))  # cut from the left
    ours, theirs = (m.generate_until(requests("generate_until", asked)) for m in reference)
    assert ours == theirs


def test_tasks_of_local_files_agree(folder, reference):
    tasks = Tasks.load(TaskSource([*TASKS], folder / "few" / "tasks", folder / "few" / "data"))
    model = reference[0]._model  # noqa: SLF001
    found = tasks.evaluate(model, batch_size=8)
    again = tasks.evaluate(model, batch_size=3)
    assert all(again[task] == pytest.approx(found[task], rel=1e-5) for task in TASKS)
    assert set(found) == set(TASKS) and all(f["samples"] == 30 for f in found.values())
    assert found["choices"]["acc_stderr"] > 0
    manager = TaskManager(include_path=local_definitions(folder), include_defaults=False)
    expected = simple_evaluate(
        reference[1], tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )["results"]
    for task, metrics in expected.items():
        for key, value in metrics.items():
            if isinstance(value, float) and "stderr" not in key:
                assert found[task][key.removesuffix(",none")] == pytest.approx(value, rel=1e-4)


def local_definitions(folder):
    """The tasks with their data named, as `--task-data` does it."""
    made = folder / "named"
    made.mkdir(exist_ok=True)
    for task in TASKS:
        data = str(folder / "few" / "data" / task / "test.jsonl")
        definition = json.loads((folder / "few" / "tasks" / f"{task}.yaml").read_text())
        local = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}}
        (made / f"{task}.yaml").write_text(json.dumps(definition | local))
    return made


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"names": ["choice"]}, "did you mean choices"),
        ({"data": None}, "no network.*--task-data"),
        ({"data": "nothing"}, "nothing is no folder"),
        ({"folder": "nothing"}, "nothing is no folder"),
        ({"data": "empty"}, "files of one kind"),
    ],
)
def test_tasks_that_cannot_run(folder, keys, complaint, tmp_path, monkeypatch):
    (tmp_path / "empty" / "choices").mkdir(parents=True)
    monkeypatch.setattr("fp8lm.evaluation.harness.TaskManager", of_folders_only)
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", no_network)
    asked = {
        "names": ["choices"],
        "folder": folder / "few" / "tasks",
        "data": folder / "few" / "data",
        **{
            key: tmp_path / value if isinstance(value, str) else value
            for key, value in keys.items()
        },
    }
    with pytest.raises(InputError, match=complaint):
        Tasks.load(TaskSource(**asked))


def no_network(*_, **__):
    raise ConnectionError("no network")


def of_folders_only(include_path, include_defaults=True):
    """Without the thousands of tasks that the library has, which take a minute to read."""
    return TaskManager(include_path=include_path, include_defaults=False)
