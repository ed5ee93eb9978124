"""A few small weights of every kind with an optimizer, and gradients to step them with."""

from __future__ import annotations

import torch

from fp8lm.config import OptimizerConfig
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import ParamSpec, QuantizedParam, VectorParam, vector_spec
from fp8lm.numerics import BF16, E4M3, FP32, format_by_name
from fp8lm.optim import AdamW, StatePrecision
from fp8lm.training.state import optimizer_tensors

KERNELS = ReferenceKernels()
CPU = torch.device("cpu")
LR = 1e-3


def state_precision(master="fp16", exp_avg="fp8_e4m3", exp_avg_sq="fp16", *, stochastic=False):
    return StatePrecision(
        master=None if master == "none" else format_by_name(master),
        exp_avg=format_by_name(exp_avg),
        exp_avg_sq=format_by_name(exp_avg_sq),
        stochastic_master=stochastic,
    )


FP32_STATES = state_precision("fp32", "fp32", "fp32")


def matrix(fmt=E4M3, grad=E4M3, shape=(24, 40), device=CPU):
    spec = ParamSpec(shape, lambda tensor, generator: tensor, fmt, grad)
    return QuantizedParam(spec, KERNELS, device)


def vector(fmt=BF16, size=40, device=CPU):
    return VectorParam(vector_spec(size, 0.0, fmt), KERNELS, device)


def weights(fmt=E4M3, grad=E4M3, dense=BF16, device=CPU):
    """A matrix of a linear layer, an embedding, a norm."""
    return {
        "linear": matrix(fmt, grad, device=device),
        "embedding": matrix(dense, FP32, (50, 16), device),
        "norm": vector(dense, device=device),
    }


def initial(weight_dict, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.spec.shape, generator=generator) * 0.02 + 0.5 * (name == "norm")
        for name, weight in weight_dict.items()
    }


def optimizer(weight_dict, precision=None, *, seed=1, values=None, **config):
    """AdamW over `weight_dict`, started from `values` (default: `initial`)."""
    config = OptimizerConfig(**{"lr": LR, **config})
    adam = AdamW(weight_dict, config, precision or state_precision(), KERNELS, seed=seed)
    for name, value in (values or initial(weight_dict)).items():
        adam.initialize(name, value)
    return adam


def random_gradients(weight_dict, seed, amplitude=1e-2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(weight.spec.shape, generator=generator) * amplitude
        for name, weight in weight_dict.items()
    }


def set_gradients(weight_dict, gradients):
    for name, gradient in gradients.items():
        grad = weight_dict[name].main_grad
        grad.zero()
        grad.add(gradient.to(grad.value.device))


def step(adam, seed, amplitude=1e-2, lr=LR):
    set_gradients(adam.weights, random_gradients(adam.weights, seed, amplitude))
    return adam.step(lr)


def all_bytes(adam):
    """A copy of everything a step may change, as bytes by name."""
    tensors = {str(key): tensor for key, tensor in optimizer_tensors(adam).items()}
    for name, weight in adam.weights.items():
        tensors[f"{name}.payload"] = weight.model_param.payload
        tensors[f"{name}.scale"] = weight.model_param.scale
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).clone()
        for name, tensor in tensors.items()
    }


def assert_same_bytes(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
