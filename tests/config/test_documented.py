"""The files in configs/ say how to launch them and what that amounts to, and it is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp8lm.config import load_config
from fp8lm.config.generated import reference_text
from fp8lm.launch.preflight import check_run
from tests.launch.documented import arithmetic, launch_options, opening

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
OF_SCRIPTS = {"base", "gpt_mini", "quickstart"}  # a part, and what other scripts launch
MODELS = sorted(path for path in CONFIGS.glob("*.yaml") if path.stem not in OF_SCRIPTS)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_opening_comment(path):
    """On a difference: what must stand there is in the message."""
    expected = arithmetic(path)
    assert opening(path)[-len(expected) :] == expected, "\n" + "\n".join(expected)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_it_can_be_launched_so(path):
    options = launch_options(path)
    assert Path(options.config).name == path.name and not options.overrides
    check_run(load_config(path), options.nnodes, options.nproc_per_node or 1)


@pytest.mark.parametrize("name", ["bf16", "te", "o1", "o2", "o3"])
def test_precision_files(name, tmp_path):
    """Each sets the preset of its name, and only that, over any model."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: [{CONFIGS}/gpt_7b.yaml, {CONFIGS}/precision/{name}.yaml]\n")
    expected = load_config(CONFIGS / "gpt_7b.yaml", [f"precision.preset={name}"])
    assert load_config(path) == expected and expected.precision.preset == name


# FP8-LM, Table 4: tensor-, pipeline- and data-parallel sizes
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("gpt_7b", (1, 1, 32)), ("gpt_13b", (2, 1, 16)), ("gpt_175b", (8, 4, 4))],
)
def test_layouts_of_the_paper(name, sizes):
    config, options = (
        load_config(CONFIGS / f"{name}.yaml"),
        launch_options(CONFIGS / f"{name}.yaml"),
    )
    parallel, world = config.parallel, options.nnodes * options.nproc_per_node
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    assert (tensor, stages, world // (tensor * stages)) == sizes
    assert parallel.sequence_parallel == (tensor > 1)


def test_reference_is_current():
    """On a difference: python -m fp8lm.config --reference > docs/reference/config.md."""
    assert (ROOT / "docs/reference/config.md").read_text() == reference_text()
