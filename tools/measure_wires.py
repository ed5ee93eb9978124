"""Which FP8 format the tensor-parallel wires should carry: SNR of E4M3 and E5M2.

python tools/measure_wires.py --config configs/gpt_mini.yaml [--steps 200] [section.key=value ...]

Trains the config's model on one process and records one step's traffic at the boundaries of its
layers: activations and their gradients as a gather sends them, layer outputs and input gradients
as a reduction does. Each is cast with one scale per message, as on the wire.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

from fp8lm.batch import Batch
from fp8lm.comm.groups import process_groups
from fp8lm.comm.handles import Handle
from fp8lm.config import load_config
from fp8lm.data.batches import BatchIterator
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.quantizer import Quantizer
from fp8lm.layers.tp_context import TPComm, TPContext
from fp8lm.model import GPTModel
from fp8lm.model.objectives import Objective
from fp8lm.numerics import E4M3, E5M2, Format
from fp8lm.optim.schedule import LearningRate
from fp8lm.runtime.ending import exit_with
from fp8lm.runtime.errors import CommandParser
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.training.builders import (
    build_data,
    build_objective,
    build_one_process,
    model_vocab_size,
)
from fp8lm.training.step import train_step

KERNELS = ReferenceKernels()
Traffic = dict[str, list[Tensor]]


class RecordingComm(TPComm):
    """The communication of one rank, which keeps what it would send while `traffic` is not None."""

    def __init__(self, context: RecordingContext) -> None:
        self._context = context

    def wire_quantizer(self, operand: Quantizer, dtype: torch.dtype) -> Quantizer:
        """See `TPComm`."""
        kind = "gather, gradient" if operand.format == E5M2 else "gather, activation"

        def observe(x: Tensor, quantized: ScaledTensor) -> None:
            self._context.record(kind, x)

        return Quantizer(operand.format, operand.kernels, observer=observe)

    def reduce(self, y: Tensor) -> Handle[Tensor]:
        """See `TPComm`."""
        backward = not torch.is_grad_enabled() and self._context.in_backward
        self._context.record("reduce, gradient" if backward else "reduce, output", y)
        return super().reduce(y)


class RecordingContext(TPContext):
    """One rank whose boundaries are recorded."""

    def __init__(self) -> None:
        self.traffic: Traffic | None = None
        self.in_backward = False

    def replicated_side(self) -> TPComm:
        """See `TPContext`."""
        return RecordingComm(self)

    def record(self, kind: str, x: Tensor) -> None:
        """Keep a copy."""
        if self.traffic is not None:
            self.traffic[kind].append(x.detach().float().clone())


def main(argv: list[str]) -> None:
    """Train, record, print."""
    parser = CommandParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=200)
    options, overrides = parser.parse_known_args(argv)
    config = load_config(options.config, overrides)
    with process_groups(torch.device("cpu")):
        samples = (options.steps + 2) * config.train.global_batch_size
        data = build_data(config, (samples, 0, 0))
    training, num_ids = data.datasets[0], data.tokenizer.vocab_size
    assert training is not None  # its size is not 0
    batches = BatchIterator(
        training,
        micro_batch_size=config.train.micro_batch_size,
        rank=0,
        world_size=1,
        consumed_samples=0,
    )
    tp = RecordingContext()
    vocab_size, cpu = model_vocab_size(config, num_ids), torch.device("cpu")
    model, optimizer = build_one_process(config, vocab_size, KERNELS, cpu, tp)
    objective = build_objective(config, num_ids, KERNELS, tp)
    rates = LearningRate(config.optimizer, config.scheduler, config.train)
    for step in range(options.steps):
        rate = rates.rate(step, batches.consumed_samples)
        train_step(model, optimizer, objective, batches.next(1), rate)
    report(record_step(model, objective, tp, batches.next(1)[0]))


def record_step(
    model: GPTModel, objective: Objective, tp: RecordingContext, batch: Batch
) -> Traffic:
    """Traffic of one forward and backward."""
    tp.traffic = defaultdict(list)
    loss = objective.loss(model.forward_step(None, batch), batch)
    tp.in_backward = True
    loss.backward()
    return tp.traffic


def report(traffic: Traffic) -> None:
    """SNR in dB of every kind of message in both formats, over all messages."""
    print(f"{'dB':20}{'messages':>10}{'E4M3':>8}{'E5M2':>8}")
    for kind, messages in sorted(traffic.items()):
        cells = [f"{snr(messages, fmt):8.1f}" for fmt in (E4M3, E5M2)]
        print(f"{kind:20}{len(messages):10}" + "".join(cells))


def snr(messages: list[Tensor], fmt: Format) -> float:
    """Mean over messages of signal to noise in dB."""
    values = []
    for x in messages:
        noise = (KERNELS.dequantize(KERNELS.quantize(x, fmt)) - x).double().square().sum()
        values.append(10 * math.log10(x.double().square().sum() / noise))
    return sum(values) / len(values)


if __name__ == "__main__":
    exit_with(main)
