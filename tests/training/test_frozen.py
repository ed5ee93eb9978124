"""Weights that are not trained: what they hold, and that all others train as if they were."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fp8lm.comm import WireCounter
from fp8lm.comm.dims import ParallelDims
from fp8lm.comm.groups import model_parallel_groups
from fp8lm.kernels import ReferenceKernels
from fp8lm.layers.param import freeze, named_params, trainable
from fp8lm.layers.recipe import Recipe
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.parallel.parallelize import build_tp_context, parallelize, stage_specs
from fp8lm.training.builders import build_model, build_objective, build_optimizer
from fp8lm.training.memory import state_bytes
from fp8lm.training.state import model_tensors
from fp8lm.training.step import train_step
from tests.model.tiny import CPU, KERNELS, SHAPES, batch, build, loss_and_gradients
from tests.training.runs import LLAMA

pytestmark = pytest.mark.slow

VOCABULARY = 64
FIRST = ("embedding.", "decoder.layers.0.")
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {
    "dp2": {},
    "dp2 even, overlapped": {
        "partition": "even",
        "overlap_param_gather": True,
        "ddp_bucket_size": 3000,
    },
    "dp2 plain": {"use_distributed_optimizer": False},
    "tp2": TP2,
    "pp2": PP2,
    # The first chunk of the first stage is frozen as a whole.
    "pp2 interleaved": PP2 | {"num_layers_per_virtual_pipeline_stage": 1},
    "pp2 zb-h1": PP2 | {"pipeline_schedule": "zb-h1"},
}


@pytest.mark.parametrize("preset", ["o3", "bf16"])
def test_a_frozen_model_holds_its_weights_alone(preset):
    gpt = build(SHAPES["llama"], dict(preset=preset))
    logits = gpt(batch().tokens)
    freeze(gpt)
    weights = named_params(gpt)
    held = state_bytes(weights, {})
    assert held.pop("weights") == sum(w.model_param.nbytes for w in weights.values()) > 0
    assert not any(held.values())
    for weight in weights.values():
        with pytest.raises(RuntimeError, match="frozen"):
            _ = weight.main_grad
    again = gpt(batch().tokens)
    assert torch.equal(again, logits) and not again.requires_grad


@pytest.mark.parametrize("shape", ["llama", "learned"])
@pytest.mark.parametrize("preset", ["o3", "te"])
def test_gradients_pass_through_frozen_layers(shape, preset):
    whole, part = (build(SHAPES[shape], dict(preset=preset)) for _ in range(2))
    loss, gradients = loss_and_gradients(whole, batch())
    for module in (part.decoder.layers["1"], part.decoder.final_layernorm):
        freeze(module)
    trained = trainable(named_params(part))
    same, others = loss_and_gradients(part, batch())
    assert torch.equal(same, loss) and others.keys() == trained.keys() < gradients.keys()
    for name, gradient in others.items():
        assert torch.equal(gradient.payload, gradients[name].payload), name


def test_frozen_layers_save_no_inputs():
    def saved(gpt):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda t: sizes.append(t.nbytes * (t.dtype == torch.uint8)) or t, lambda t: t):
            gpt(batch().tokens)
        return sum(sizes)

    whole, part = (build(SHAPES["llama"], dict(preset="o3")) for _ in range(2))
    freeze(part.decoder.layers["1"])
    assert saved(part) == saved(whole) / 2 > 0


def tensors_of(weights):
    return {str(key): tensor for key, tensor in model_tensors(weights).items()}


def steps(config, count, frozen=FIRST):
    """Losses of some steps and this rank's weights, those frozen whose names begin so."""
    dims = ParallelDims.from_config(config.parallel, dist.get_world_size())
    with model_parallel_groups(dims) as groups:
        kernels, counter = ReferenceKernels(), WireCounter()
        tp = build_tp_context(config, groups, kernels, counter)
        recipe = Recipe.from_config(config.precision, kernels, CPU, tp)
        specs = stage_specs(config, groups.pipeline_parallel.rank())
        chunks = [build_model(config, VOCABULARY, recipe, part) for part in specs]
        for name, weight in (item for chunk in chunks for item in named_params(chunk).items()):
            if frozen and name.startswith(frozen):
                weight.freeze()
        made = parallelize(config, groups, chunks, kernels, counter, CPU)
        optimizer = build_optimizer(config, made.weights, kernels, made.sharding)
        started = {name: t.clone() for name, t in tensors_of(made.weights).items()}
        model = chunks[0] if len(chunks) == 1 else torch.nn.ModuleList(chunks)
        objective = build_objective(config, VOCABULARY, kernels, tp)
        replica = groups.data_parallel.rank()
        losses = [
            train_step(
                model,
                optimizer,
                objective,
                [batch(10 * step + 2 * replica), batch(10 * step + 2 * replica + 1)],
                1e-2,
                made.data_parallel,
                made.pipeline,
            ).loss
            for step in range(count)
        ]
        made.data_parallel.finish_param_sync()
        return losses, started, tensors_of(made.weights), list(optimizer.weights)


def is_frozen(name):
    return name.removeprefix("model.").startswith(FIRST)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rest_trains_as_if_the_gradients_of_the_frozen_were_dropped(
    layout, tiny_config, run_distributed
):
    """Without clipping a weight's first update does not depend on any other's gradient."""
    config = tiny_config(
        {"model": LLAMA | {"num_layers": 4}, "parallel": LAYOUTS[layout]},
        {"optimizer": {"clip_grad": 0.0}, "precision": {"preset": "o3"}},
    )
    whole, part = (run_distributed(steps, 2, config, 1, frozen) for frozen in ((), FIRST))
    for (_, _, expected, _), (_, started, weights, updated) in zip(whole, part, strict=True):
        assert updated and not any(map(is_frozen, updated))
        for name, tensor in weights.items():
            assert torch.equal(tensor, (started if is_frozen(name) else expected)[name]), name
            changed = name.endswith("payload") and not torch.equal(tensor, started[name])
            assert changed or is_frozen(name) or name.endswith("scale") or "norm" in name, name


def test_several_steps_of_one_process(tiny_config):
    """An optimizer that is given all but the frozen weights of a model that has all gradients."""
    config = tiny_config({"precision": {"preset": "o3"}})
    results = []
    for freezes in (False, True):
        recipe = Recipe.from_config(config.precision, KERNELS, CPU)
        gpt = build_model(config, VOCABULARY, recipe)
        weights = named_params(gpt)
        for name, weight in weights.items():
            if freezes and name.startswith(FIRST):
                weight.freeze()
        rest = {name: w for name, w in weights.items() if not name.startswith(FIRST)}
        sharding = OptimizerSharding.build(rest)
        build_optimizer(config, weights, KERNELS, OptimizerSharding.build(trainable(weights)))
        optimizer = build_optimizer(config, rest, KERNELS, sharding)
        objective = build_objective(config, VOCABULARY, KERNELS)
        losses = [train_step(gpt, optimizer, objective, [batch(k)], 1e-2).loss for k in range(4)]
        results.append((losses, tensors_of(weights)))
    (expected, whole), (losses, part) = results
    assert torch.equal(torch.stack(losses), torch.stack(expected))
    assert all(torch.equal(part[name], whole[name]) for name in whole)


def test_a_model_of_which_nothing_is_trained_is_refused(tiny_config, run_distributed):
    with pytest.raises(ValueError, match="nothing is left to train"):
        run_distributed(steps, 1, tiny_config(), 1, ("",))
