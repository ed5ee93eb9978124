"""What is compiled ahead of time: operations at sizes of a 7B model's layers."""

import torch

from fp8lm.comm import MessageLayout
from fp8lm.config import PrecisionConfig
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.rounding import ElementIndex
from fp8lm.kernels.triton.backend import TritonKernels
from fp8lm.numerics import (
    E2M5,
    E4M3,
    E5M2,
    FP16,
    PER_ROW,
    PER_TENSOR,
    format_by_name,
    granularity_of,
)
from fp8lm.optim import StatePrecision
from fp8lm.scaled_tensor import ScaledTensor

KERNELS = TritonKernels()
WHOLE = ElementIndex()
SHAPE = (4096, 4096)  # tokens and features, or a weight


def activations(dtype=torch.bfloat16, shape=SHAPE):
    return torch.empty(shape, dtype=dtype)


def stored(fmt):
    total = ScaledTensor.zeros(SHAPE, fmt, torch.device("cpu"), granularity_of(fmt, SHAPE))
    return total.elements(0, total.payload.numel())


def amax():
    KERNELS.amax(activations())


def quantize_e4m3():
    KERNELS.quantize(activations(), E4M3, amax=torch.zeros(()))


def both_orientations_e4m3():
    KERNELS.quantize_with_transpose(activations(), E4M3, amax=torch.zeros(()))


def both_orientations_e5m2():
    KERNELS.quantize_with_transpose(activations(), E5M2)


def both_orientations_and_sums():
    x = activations()
    KERNELS.quantize_with_transpose(x, E5M2, sums=True)
    KERNELS.column_sums(x)


def both_orientations_of_an_odd_shape():
    KERNELS.quantize_with_transpose(activations(shape=(1001, 1003)), E4M3)


def quantize_rows():
    KERNELS.quantize(activations(), E4M3, granularity=PER_ROW)


def quantize_blocks():
    KERNELS.quantize(stored(E2M5).payload.to(torch.bfloat16), E2M5, granularity=PER_ROW)


def transpose():
    KERNELS.transpose(stored(E4M3).view(*SHAPE))


def accumulate_e4m3():
    KERNELS.accumulate_(stored(E4M3), activations().view(-1))


def accumulate_e2m5():
    total = stored(E2M5)
    KERNELS.accumulate_(total, activations().view(total.shape))


def dequantize_fp16():
    KERNELS.dequantize(stored(FP16))


def dequantize_e4m3():
    KERNELS.dequantize(stored(E4M3), torch.bfloat16)


def square_sum_e4m3():
    KERNELS.square_sums_and_amaxes([stored(E4M3)])


def square_sum_e2m5():
    KERNELS.square_sums_and_amaxes([stored(E2M5)])


def messages():
    """Of a tensor-parallel rank to seven others."""
    layout = MessageLayout((((512, 4096), E4M3),))
    buffer = torch.empty(7, layout.nbytes, dtype=torch.uint8)
    return [tensor for (tensor,) in layout.views_of(list(buffer))]


def pack():
    chunks = activations().chunk(8)
    KERNELS.quantize_into([*chunks[:3], *chunks[4:]], messages())


def pack_tokens():
    buffer = torch.empty(4096 * (4096 + 4), dtype=torch.uint8)
    payload, scale = buffer[: 4096 * 4096].view(SHAPE), buffer[4096 * 4096 :].view(torch.float32)
    message = ScaledTensor(payload, scale[:, None], E4M3, PER_ROW)
    KERNELS.quantize_into([activations()], [message])
    KERNELS.dequantize(message, torch.bfloat16)


def join():
    KERNELS.join(messages(), torch.bfloat16)


def sum_in_order():
    sent, own = messages(), activations(shape=(512, 4096))
    KERNELS.sum_in_order([*sent[:3], own, *sent[3:]], torch.bfloat16)


def sum_of_replicas():
    """In E2M5, with a scale per block; one's own was not sent."""
    layout = MessageLayout(((SHAPE, E2M5),), (granularity_of(E2M5, SHAPE),))
    buffer = torch.empty(3, layout.nbytes, dtype=torch.uint8)
    sent = [tensor for (tensor,) in layout.views_of(list(buffer))]
    own = ScaledTensor.zeros(SHAPE, E2M5, torch.device("cpu"), granularity_of(E2M5, SHAPE))
    KERNELS.sum_in_order([*sent, own], torch.float32, divisor=4)


def add_in_format():
    KERNELS.add_in_format(stored(E4M3), stored(E4M3))


def heads(of_group=3, groups=32, size=128):
    """A micro-batch of 2 sequences of 2048."""
    return activations(shape=(2048, 2, groups, of_group, size))


def angles():
    return (activations(shape=(2048, 1, 1, 128)),) * 2


def rope():
    KERNELS.rope(heads(), *angles(), slice(0, 1))


def rope_backward():
    of_queries = heads(1)[..., 0, :]
    gradients = (of_queries, of_queries, of_queries.transpose(0, 1).contiguous().transpose(0, 1))
    KERNELS.rope_backward(gradients, *angles(), slice(0, 1), 3)


def rope_of_grouped_queries():
    KERNELS.rope(heads(6, 8), *angles(), slice(0, 4))


def logits():
    """Of a micro-batch, over a padded vocabulary."""
    return activations(shape=(4096, 50304)), torch.empty(4096, dtype=torch.int64), 50257


def cross_entropy():
    KERNELS.cross_entropy(*logits(), None)


def cross_entropy_backward():
    values, labels, used = logits()
    of_tokens = torch.empty(4096)
    KERNELS.cross_entropy_backward((values, labels, of_tokens), of_tokens, used)


def optimizer_step(preset, shape=SHAPE, index=WHOLE):
    """A step of one weight in the formats of a preset."""
    precision = PrecisionConfig(preset=preset)
    states = StatePrecision.from_config(precision)
    stored = format_by_name(precision.params_dtype)
    gradient = format_by_name(precision.main_grads_dtype)
    owns_master = states.own_master(stored) is not None
    master = states.own_master(stored) or stored

    def zeros(fmt, granularity=PER_TENSOR):
        return ScaledTensor.zeros(shape, fmt, torch.device("cpu"), granularity)

    param = AdamParam(
        row=0,
        gradient=zeros(gradient, granularity_of(gradient, shape)),
        model_param=zeros(stored) if owns_master else None,
        master=zeros(master),
        exp_avg=zeros(states.exp_avg),
        exp_avg_sq=zeros(states.exp_avg_sq),
        weight_decay=0.1,
        index=index,
    )
    one = torch.ones(())
    cut_off = one if states.exp_avg_sq.root else None
    c = AdamCoefficients(0.9, 0.95, 1e-8, 1e-3, one, one, one, cut_off, torch.tensor(False))
    table = AdamTable(torch.ones(1, 4), torch.zeros(1, dtype=torch.int32), states.rounding)
    KERNELS.adam([param], table, c)


def adam_bf16():
    optimizer_step("bf16")


def adam_o1():
    optimizer_step("o1")


def adam_o3():
    optimizer_step("o3")


def adam_o3_long():
    optimizer_step("o3_long")


def adam_o4():
    optimizer_step("o4")


def adam_o3_sharded():
    optimizer_step("o3", index=ElementIndex(0, 512, 1, 3, 8))


def adam_o3_of_an_odd_shape():
    optimizer_step("o3", shape=(1001, 1003))


def swiglu():
    KERNELS.swiglu(activations(shape=(4096, 2 * 11008)))


def swiglu_backward():
    x, dy = (activations(shape=(4096, width)) for width in (2 * 11008, 11008))
    KERNELS.swiglu_backward(x, dy)


def gelu():
    KERNELS.gelu(activations(shape=(4096, 16384)), "tanh")


def gelu_backward():
    x = activations(shape=(4096, 16384))
    KERNELS.gelu_backward(x, x, "tanh")


def gelu_erf():
    KERNELS.gelu(activations(shape=(4096, 16384)), "none")


def gelu_erf_backward():
    x = activations(shape=(4096, 16384))
    KERNELS.gelu_backward(x, x, "none")


def layer_norm():
    KERNELS.norm(activations(), *(activations(shape=(4096,)),) * 2, 1e-5)


def layer_norm_backward():
    x, weight, rows = activations(), activations(shape=(4096,)), torch.empty(4096)
    KERNELS.norm_backward(x, weight, weight, (rows, rows), x, 1e-5, x)


def rms_norm():
    KERNELS.norm(activations(), activations(shape=(4096,)), None, 1e-5)


def layer_norm_of_wide_rows():
    x, weight = activations(shape=(4096, 12288)), activations(shape=(12288,))
    KERNELS.norm(x, weight, weight, 1e-5)


def layer_norm_backward_of_wide_rows():
    x, weight, rows = (
        activations(shape=(4096, 12288)),
        activations(shape=(12288,)),
        torch.empty(4096),
    )
    KERNELS.norm_backward(x, weight, weight, (rows, rows), x, 1e-5, x)


def rms_norm_backward_of_long_rows():
    x, weight, rows = activations(shape=(4096, 8192)), activations(shape=(8192,)), torch.empty(4096)
    KERNELS.norm_backward(x, weight, None, (rows,), x, 1e-5, x)
