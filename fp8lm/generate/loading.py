"""The model of a checkpoint, ready to compute under the layout of the process groups."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fp8lm.arguments import number_type, path_text
from fp8lm.comm.groups import ProcessGroups, process_groups, rank_device
from fp8lm.config import ParallelConfig
from fp8lm.data.tokenizer import TOKENIZER_TYPES
from fp8lm.generate.model import InferenceModel
from fp8lm.runtime.launchers import adopt_launcher
from fp8lm.runtime.streams import complain
from fp8lm.training.builders import resolve_device
from fp8lm.training.restore import restore_model


def add_model_arguments(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """The options of a tool that say which model, or `several`, it loads, and where it computes."""
    add = parser.add_argument_group("model").add_argument
    add(
        "--load",
        type=path_text,
        required=True,
        action="append" if several else "store",
        help="folder of checkpoints, or one of them" + several * "; repeatable, to compare",
    )
    add("--tokenizer-model", type=path_text, help="not the checkpoint's own: a file or folder")
    add("--tokenizer-type", choices=TOKENIZER_TYPES, help="its kind, if another")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    of_layout = "of the model, whatever it was trained with; start them with torchrun"
    add(
        "--tensor-model-parallel-size",
        type=number_type(1),
        default=1,
        metavar="T",
        help=f"ranks that hold a part of every layer {of_layout}",
    )
    add(
        "--pipeline-model-parallel-size",
        type=number_type(1),
        default=1,
        metavar="P",
        help="stages that hold some of the layers each",
    )


@dataclass(frozen=True)
class Job:
    """The process groups that options of `add_model_arguments` ask for; opens models there."""

    groups: ProcessGroups
    device: torch.device
    tokenizer: tuple[str | None, str | None]

    @contextmanager
    def model(self, folder: str) -> Iterator[InferenceModel]:
        """The model in `folder`; rank 0 reports how it differs from training."""
        model = load_model(folder, self.groups, self.device, *self.tokenizer)
        for warning in model.warnings if self.groups.is_main else ():
            complain(f"warning: {warning}")
        with model.ready():
            yield model


@contextmanager
def job_of_options(options: argparse.Namespace) -> Iterator[Job]:
    """Join the job that the launcher describes, in the layout of `options`."""
    adopt_launcher(os.environ)
    device = rank_device(resolve_device(options.device))
    parallel = ParallelConfig(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
    )
    with process_groups(device, parallel) as groups:
        yield Job(groups, device, (options.tokenizer_model, options.tokenizer_type))


@contextmanager
def model_of_options(options: argparse.Namespace) -> Iterator[InferenceModel]:
    """The model that options of `add_model_arguments` name, within its process groups."""
    with job_of_options(options) as job, job.model(options.load) as model:
        yield model


def load_model(
    folder: str,
    groups: ProcessGroups,
    device: torch.device,
    tokenizer_model: str | None = None,
    tokenizer_type: str | None = None,
) -> InferenceModel:
    """This rank's part of the model in `folder`; see `restore_model`."""
    found = restore_model(folder, groups, device, tokenizer_model, tokenizer_type)
    return InferenceModel(
        [found.model],
        found.tokenizer,
        found.config,
        groups,
        found.kernels,
        device,
        found.warnings,
    )
