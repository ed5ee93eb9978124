"""Adam's states of megatron-core's own distributed optimizer, both ways."""

from __future__ import annotations

import contextlib
import pickle
from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.overrides import TorchFunctionMode

from fp8lm.checkpoint import Checkpoint, open_checkpoint
from fp8lm.config import load_config
from fp8lm.convert.megatron import read_metadata
from fp8lm.convert.megatron_optimizer import COMMON_OBJECT, common_facts, kinds_in, why_not
from fp8lm.convert.weights import Weights
from fp8lm.runtime.errors import InputError
from fp8lm.runtime.quiet import quiet_megatron
from tests.convert.models import KERNELS, LLAMA, save_model
from tests.convert.test_megatron import process_group, their_model, write_config
from tests.training.contents import contents, values
from tests.training.runs import trainer_of

__all__ = ["process_group"]
pytestmark = pytest.mark.slow

RESHARDABLE, BUCKETS = "fully_reshardable", "dp_reshardable"
KINDS = {"master": "param", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


class OnCpu(TorchFunctionMode):
    """A CPU in place of the GPU that megatron-core's optimizer asks for by name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


@pytest.fixture
def theirs(process_group):
    """A model in BF16 with its distributed optimizer, after a step: what to save of both."""
    with quiet_megatron():
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    patches = (
        OnCpu(),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.cuda.current_device", lambda: "cpu"),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        model = their_model(LLAMA).bfloat16()
        parallel = DistributedDataParallelConfig(use_distributed_optimizer=True)
        parallel.grad_reduce_in_fp32 = True
        adam = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16)
        adam.min_lr = 1e-4  # megatron-core 0.19 takes a group for another by its learning rates
        adam.use_distributed_optimizer = True
        optimizer = get_megatron_optimizer(
            adam, [DistributedDataParallel(model.config, parallel, model)]
        )
        generator = torch.Generator().manual_seed(3)
        for parameter in model.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        assert optimizer.step()[0]

        def content(kind=RESHARDABLE, is_loading=False):
            weights = model.sharded_state_dict()
            weights = {key: own for key, own in weights.items() if "_extra_state" not in key}
            metadata = {"distrib_optim_sharding_type": kind, "chained_optim_avoid_prefix": True}
            states = optimizer.sharded_state_dict(weights, is_loading, metadata=metadata)
            return {"model": weights, "optimizer": states}

        yield model, optimizer, content


def states_of(model, optimizer):
    """fp32 states by kind and parameter."""
    (inner,) = optimizer.chained_optimizers
    found = {kind: {} for kind in KINDS}
    for name, parameter in model.named_parameters():
        held = inner._get_main_param_and_optimizer_states(parameter)  # noqa: SLF001
        for kind, theirs in KINDS.items():
            found[kind][name] = held[theirs].detach().clone().view(parameter.shape)
    return found


def save(content, place, **facts):
    from megatron.core import dist_checkpointing

    place.mkdir(parents=True)
    (place.parent / "latest_checkpointed_iteration.txt").write_text(str(int(place.name[5:])))
    dist_checkpointing.save({**content, **facts}, str(place))


def test_states_come_in(theirs, convert, tmp_path):
    model, optimizer, content = theirs
    save(content(), tmp_path / "mc" / "iter_0000007", iteration=7)
    config = write_config(tmp_path / "model.yaml", LLAMA)
    said = convert("megatron", "fp8lm", tmp_path / "mc", tmp_path / "ck", "--config", config)
    assert "optimizer: master weights and moments in fp32" in said and "iteration 7" in said
    found, expected = contents(tmp_path / "ck"), states_of(model, optimizer)
    for kind, params in expected.items():
        for param, state in params.items():
            own = values(found, f"optimizer.{kind}.{param}").reshape(-1, *state.shape[1:])
            assert torch.equal(own[: len(state)], state), (kind, param)
    row = found["optimizer.amax.decoder.layers.1.mlp.linear_fc1.weight"]
    for amax, kind in zip(row, KINDS, strict=True):
        assert amax == expected[kind]["decoder.layers.1.mlp.linear_fc1.weight"].abs().max()
    assert found["optimizer.num_steps"] == 1  # Adam's own, whatever the iteration
    assert open_checkpoint(tmp_path / "ck").common["consumed_samples"] == 7


@pytest.mark.parametrize("master", ["param", "fp32_param", None])
def test_names_of_the_master(master):
    """That of a model in fp32 is the weight itself."""
    names = [*filter(None, [master]), "exp_avg", "exp_avg_sq"]
    stored = SimpleNamespace(tensors=dict.fromkeys(f"optimizer.state.{n}.x" for n in names))
    assert kinds_in(stored) == {"master": master, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
    stored.tensors.pop("optimizer.state.exp_avg_sq.x")
    assert kinds_in(stored) is None and "there are none" in why_not(stored)


@pytest.mark.parametrize("damage", [None, "bytes", "object", "file"])
def test_facts_in_an_object_of_the_checkpoint(damage, tmp_path):
    """Where megatron-core 0.19 has what was in `common.pt`."""
    facts = {"iteration": 7, "args": Namespace(global_batch_size=4)}
    stored = {"x": torch.zeros(3)}
    if damage != "object":
        stored[COMMON_OBJECT] = [facts]
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(stored, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.storage_meta = None  # as Megatron's writer leaves it; a path here
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    checkpoint = Checkpoint(tmp_path, {}, read_metadata(tmp_path))
    if damage is None:
        assert common_facts(checkpoint) == {"iteration": 7, "args": {"global_batch_size": 4}}
        return
    (file,) = tmp_path.glob("*.distcp")
    if damage == "bytes":
        file.write_bytes(bytes(file.stat().st_size))
    elif damage == "file":
        file.unlink()
    says = {"bytes": "is damaged", "object": "give --weights-only", "file": "cannot be read"}
    with pytest.raises(InputError, match=says[damage]):
        common_facts(checkpoint)


def test_states_in_buckets_stay(theirs, convert, tmp_path):
    save(theirs[2](BUCKETS), tmp_path / "mc" / "iter_0000007", iteration=7)
    config = write_config(tmp_path / "model.yaml", LLAMA)
    given = tmp_path / "mc", tmp_path / "ck", "--config", config
    said = convert("megatron", "fp8lm", *given)
    assert "in buckets" in said and "checkpoint.pretrained" in said


def test_its_optimizer_reads_what_goes_out(theirs, convert, tmp_path, monkeypatch):
    from megatron.core import dist_checkpointing

    model, optimizer, content = theirs
    folder = save_model(tmp_path / "ck", LLAMA, {"preset": "o3"})
    said = convert("fp8lm", "megatron", folder, tmp_path / "mc")
    assert "optimizer: master weights and moments in fp32" in said
    loaded = dist_checkpointing.load(content(is_loading=True), str(tmp_path / "mc/iter_0000001"))
    groups = loaded["optimizer"]["optimizer"]["param_groups"]
    assert {group["step"] for group in groups} == {0}  # this checkpoint has not trained
    adam = optimizer.chained_optimizers[0].optimizer

    def load_adam(state):
        """Without the steps, which TransformerEngine's Adam does not keep in its states."""
        torch.optim.Optimizer.load_state_dict(adam, state)
        for own in adam.state.values():
            del own["step"]

    monkeypatch.setattr(adam, "load_state_dict", load_adam)
    optimizer.load_state_dict(loaded["optimizer"])
    weights = Weights.of(open_checkpoint(folder))
    for kind, params in states_of(model, optimizer).items():
        for param, state in params.items():
            rows = weights.shapes[param][0]
            ranges = ((0, rows),)
            own = torch.cat(list(weights.values(param, ranges, torch.float32, kind)))
            assert torch.equal(state[:rows], own), (kind, param)
    convert("fp8lm", "megatron", folder, tmp_path / "weights", "--weights-only")
    assert "optimizer" not in torch.load(
        tmp_path / "weights" / "iter_0000001" / "common.pt", weights_only=False
    )


def test_a_run_goes_on_in_its_own_formats(theirs, convert, tmp_path):
    """FP8 and FP16 states are what a cast of the fp32 ones gives."""
    model, optimizer, content = theirs
    arguments = Namespace(consumed_train_samples=28, global_batch_size=4)
    save(content(), tmp_path / "mc" / "iter_0000007", iteration=7, args=arguments)
    config = write_config(tmp_path / "model.yaml", LLAMA)
    convert("megatron", "fp8lm", tmp_path / "mc", tmp_path / "ck", "--config", config)
    given = ("precision.preset=o3", "train.train_iters=9", "train.global_batch_size=4")
    silent = ("train.eval_iters=0", "logging.tensorboard=false")
    run = load_config(str(config), [*given, *silent, f"checkpoint.load={tmp_path / 'ck'}"])
    expected = states_of(model, optimizer)
    with trainer_of(run) as trainer:
        assert (trainer.progress.iteration, trainer.progress.consumed_samples) == (7, 28)
        for name, state in trainer.run.optimizer.states.items():
            for kind, own in zip(KINDS, state.stored, strict=True):
                values = expected[kind][name]
                padding = values.new_zeros(len(own.payload) - len(values), *values.shape[1:])
                cast = KERNELS.quantize(torch.cat((values, padding)), own.format)
                assert torch.equal(own.payload, cast.payload) and own.scale == cast.scale
        assert trainer.train() == 0 and trainer.progress.iteration == 9
