"""Nothing of a step is on the host or waits for it: on the meta device either raises at once.

A tensor there has no values, so `.item()`, `bool()` and `.tolist()` fail, as does an operation
that mixes it with a CPU tensor of one dimension or more. That is what a GPU would stop for.
"""

from __future__ import annotations

import pytest
import torch

from fp8lm.config import OptimizerConfig
from fp8lm.kernels.hopper import HopperKernels
from fp8lm.optim import AdamW
from fp8lm.optim.sharding import OptimizerSharding
from tests.optim.bench import LR, initial, state_precision, weights
from tests.optim.test_skip import SETTINGS

META = torch.device("meta")
NAMES = ["linear", "embedding", "norm"]


def make(setting, owned):
    fmt, grad, states = SETTINGS[setting]
    made = weights(fmt, grad, device=META)
    sent = []

    def gather(values):
        sent.append(values)
        return values.expand(2, -1)

    def largest(values):
        sent.append(values)
        return values

    rows = {name: (0, made[name].spec.shape[0]) for name in owned}
    adam = AdamW(
        made,
        OptimizerConfig(lr=LR),
        state_precision(*states, stochastic=True),
        HopperKernels(),
        seed=1,
        sharding=OptimizerSharding.build(made, local_shards=rows, gather=gather, max=largest),
    )
    for name, value in initial(made).items():
        adam.initialize(name, value)
    return adam, sent


@pytest.mark.parametrize("owned", [NAMES, ["norm"], []], ids=["all", "one", "none"])
@pytest.mark.parametrize("setting", ["o3", "o2", "bf16"])
def test_steps_norms_and_amaxes_stay_on_the_device(setting, owned):
    adam, sent = make(setting, owned)
    for weight in adam.weights.values():
        weight.main_grad.add(torch.zeros(weight.spec.shape, device=META))
    gradients = {name: adam.weights[name].main_grad.value for name in owned}
    results = [adam.step(LR, gradients, loss=torch.ones((), device=META)).skip, adam.params_norm()]
    adam.share_amax()
    assert [result.device for result in results] == [META] * 2
    assert len(sent) == 4 and all(values.device == META for values in sent)
