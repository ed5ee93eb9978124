"""Every token that counts, counts the same: the loss does not know how its batch was cut."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fp8lm.batch import Batch
from fp8lm.kernels import ReferenceKernels
from fp8lm.model.objectives import LanguageModeling, MeanOfMicrobatches
from fp8lm.numerics import FP32
from fp8lm.optim.clipping import gradient_norm
from tests.training.runs import read, trainer_of

FP32_KEYS = {"preset": "bf16", "gemm": "fp32", "params_dtype": "fp32", "wire": {"grads": "fp32"}}
BATCH = {"micro_batch_size": 8, "global_batch_size": 8, "train_iters": 2}
EVALUATION = {"eval_iters": 2, "eval_interval": 1}
NO_WARMUP = {"lr_warmup_iters": 0}
EVEN = {"partition": "even"}
PLAIN = {"use_distributed_optimizer": False}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {"num_layers_per_virtual_pipeline_stage": 1}
ZB = {"pipeline_schedule": "zb-h1"}


class Uneven(torch.utils.data.Dataset):
    """Samples of which between none and all tokens count: few in one half of a batch of 8."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        counted = (index * 5 % 7) if index % 8 < 4 else 16 - index % 3
        mask = (torch.arange(16) < counted).float()
        return self.dataset[index] | {"loss_mask": mask}


class Masked(Uneven):
    """Samples of which no token counts."""

    def __getitem__(self, index):
        return self.dataset[index] | {"loss_mask": torch.zeros(16)}


def on(dataset, trainer):
    """Give `trainer` the samples of its datasets as `dataset` changes them."""
    datasets = tuple(split and dataset(split) for split in trainer.run.datasets)
    trainer.run = replace(trainer.run, datasets=datasets)


def train_on(config, dataset):
    """Train on `dataset` of what `config` names."""
    with trainer_of(config) as trainer:
        on(dataset, trainer)
        trainer.train()


@pytest.fixture
def losses(tiny_config, run_distributed, tmp_path):
    """`losses(ranks, micro_batch_size, ...)`: a run's validation losses, losses, gradient norms."""
    runs = iter(range(100))

    def run(ranks, micro_batch_size, precision=FP32_KEYS, dataset=Uneven, train=None, **parallel):
        folder = tmp_path / str(next(runs))
        steps = BATCH | EVALUATION | {"micro_batch_size": micro_batch_size} | (train or {})
        config = tiny_config(
            {"model": {"num_layers": 4}, "train": steps, "scheduler": NO_WARMUP},
            {"precision": precision, "parallel": parallel},
            {"logging": {"dir": str(folder), "log_interval": 1}},
        )
        run_distributed(train_on, ranks, config, dataset)
        lines = read(folder)
        keys = ("lm loss validation", "lm loss", "grad-norm")
        return torch.tensor([line[key] for key in keys for line in lines if key in line])

    return run


def close(found, expected, bound, case=None):
    torch.testing.assert_close(found, expected, rtol=bound, atol=0, msg=lambda m: f"{case}: {m}")


# A sum's roundings, 2^-24 each.
FP32_BOUND = 1e-6


def test_micro_batches_change_roundings_only(losses):
    whole = losses(1, 8)
    assert abs(whole[0] - math.log(64)) < 0.1  # untrained: close to uniform over the tokens
    one_mean = losses(1, 8, train={"calculate_per_token_loss": False})
    close(one_mean, whole, FP32_BOUND)  # of a step of one micro-batch it is the same
    for micro_batch_size in (4, 2, 1):
        close(losses(1, micro_batch_size), whole, FP32_BOUND, micro_batch_size)


@pytest.mark.slow
def test_replicas_and_stages_change_roundings_only(losses):
    whole = losses(1, 8)
    for micro_batch_size, parallel in (
        (4, {}),
        (2, EVEN),
        (1, PLAIN),
        (2, TP2),
        (2, PP2),
        (1, PP2 | INTERLEAVED),
        (1, PP2 | ZB),
    ):
        close(losses(2, micro_batch_size, **parallel), whole, FP32_BOUND, parallel)


# E4M3's 2^-4 on gradients that are added up micro-batch by micro-batch; losses are means of many.
def test_in_fp8_the_same_up_to_its_roundings(losses):
    precision = {"preset": "o3"}
    whole, cut = losses(1, 8, precision), losses(1, 1, precision)
    close(cut[:-2], whole[:-2], 2e-3)
    close(cut[-2:], whole[-2:], 2.0**-4)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["fp32_accumulate", "fp8_sum"])
def test_replicas_in_fp8(losses, reduction):
    precision = {"preset": "o3", "grad_reduce": reduction}
    whole, replicas = losses(1, 8, precision={"preset": "o3"}), losses(2, 4, precision)
    close(replicas[:-2], whole[:-2], 2e-3)
    close(replicas[-2:], whole[-2:], 2.0**-4)


def test_mean_of_means_by_key(losses):
    by_key = {"calculate_per_token_loss": False, "train_iters": 1}
    whole, cut = losses(1, 8, train=by_key), losses(1, 2, train=by_key)
    validation, before = cut[:2], losses(1, 8)[0]
    close(validation[0], before, FP32_BOUND)  # evaluations are weighted by tokens all the same
    assert abs(cut[-1] / whole[-1] - 1) > 0.05
    assert abs(cut[2] / whole[2] - 1) > 1e-4


def masked(mask):
    labels = torch.arange(4)[None]
    return Batch(labels, labels, torch.tensor([mask]))


def test_a_mean_of_means_is_what_it_says():
    by_token, by_microbatch = LanguageModeling(), MeanOfMicrobatches(LanguageModeling())
    logits = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))
    for batch in map(masked, MASKS):
        share = by_token.counted_share([batch])
        expected = by_token.loss(logits, batch) / share.clamp(min=0.25)
        torch.testing.assert_close(by_microbatch.loss(logits, batch), expected)
        assert by_microbatch.counted_share([batch]) == 1.0
    whole = masked(MASKS[0])
    assert torch.equal(by_microbatch.loss(logits, whole), by_token.loss(logits, whole))


MASKS = [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]


def test_the_share_that_counts():
    batches, counted_share = [masked(mask) for mask in MASKS], LanguageModeling().counted_share
    assert counted_share(batches[:1]) == 1.0
    assert counted_share(batches[:2]) == 7 / 8
    assert counted_share(batches) == torch.tensor(7 / 12)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_the_norm_is_that_of_the_mean_over_the_tokens_that_count(clip):
    gradient = ReferenceKernels().quantize(torch.linspace(-1, 1, 48).view(6, 8), FP32)
    share = torch.tensor(0.25)
    norm = gradient_norm([gradient], clip, ReferenceKernels(), share=share)
    times_4 = ReferenceKernels().quantize(gradient.payload * 4, FP32)
    expected = gradient_norm([times_4], clip, ReferenceKernels())
    close(norm.norm, expected.norm, 1e-6)
    close(norm.clip_factor, 4 * expected.clip_factor, 1e-6)


@pytest.mark.parametrize("per_token", [True, False])
def test_where_no_token_counts_loss_and_gradient_are_zero(
    per_token, tiny_config, train_run, read_metrics, tmp_path
):
    def mask(trainer):
        on(Masked, trainer)
        norms.append(trainer.run.optimizer.params_norm())

    norms = []
    train = {"calculate_per_token_loss": per_token, "train_iters": 2}
    trainer = train_run(
        tiny_config(
            {"train": train, "scheduler": NO_WARMUP},
            {"logging": {"dir": str(tmp_path), "log_interval": 1}},
        ),
        mask,
    )
    for line in read_metrics(tmp_path):
        if "lm loss validation" in line:
            assert line["lm loss validation"] == 0.0
        else:
            assert (line["lm loss"], line["grad-norm"], line["skipped iterations"]) == (0.0, 0.0, 0)
    # A step all the same: weights decay.
    assert 0.99 * norms[0] < trainer.run.optimizer.params_norm() < norms[0]
