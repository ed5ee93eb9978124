"""Launches, bytes and purposes of operations and of whole steps, against what can be counted."""

from __future__ import annotations

import importlib
import json
from functools import cache

import pytest
import torch

from fp8lm.comm import WireCounter
from fp8lm.config import load_config
from fp8lm.kernels.cost import declare_launch, recording
from fp8lm.runtime.errors import InputError
from tests.launch.conftest import ROOT

pytestmark = pytest.mark.slow

H200 = ROOT / "configs/hardware/h200.yaml"
GPT_7B = ROOT / "configs/gpt_7b.yaml"
BATCH, SEQUENCE, HIDDEN, VOCABULARY = 2, 128, 256, 513
SMALL = (
    f"model.hidden_size={HIDDEN}",
    "model.num_attention_heads=8",
    f"model.seq_length={SEQUENCE}",
    f"train.micro_batch_size={BATCH}",
    "tokenizer.vocab_size=512",
    "precision.master_rounding=nearest",  # half of the operations of a step are noise otherwise
)
TP8 = ("parallel.tensor_model_parallel_size=8", "parallel.sequence_parallel=true")
E, P = BATCH * SEQUENCE * HIDDEN, 12 * HIDDEN**2  # elements of hidden states, parameters
BF16, FP32 = 2, 4


@pytest.fixture(scope="module")
def tracing(tool):
    """The tool, with the modules of its package as attributes."""
    trace_step = tool("trace_step")
    for name in ("costs", "floor", "launches", "purposes", "roofline", "run"):
        setattr(trace_step, name, importlib.import_module(f"fp8lm.planner.tracing.{name}"))
    return trace_step


@pytest.fixture(scope="module")
def hardware(tracing):
    return tracing.Hardware.read(H200)


@pytest.fixture(scope="module")
def traced(tracing, hardware):
    """The cost of a step of the small model under a preset, each traced once."""

    @cache
    def trace(preset, layers, *overrides, world_size=1, kernels=None):
        shown = (f"precision.preset={preset}", f"model.num_layers={layers}", *SMALL, *overrides)
        config = load_config(GPT_7B, shown)
        return tracing.run.trace_step(config, VOCABULARY, hardware, world_size, kernels).cost

    return trace


@pytest.fixture
def launches_of(tracing, hardware):
    """Runs a function; the (launches, bytes moved, flops) of all its operations."""

    def launches(function):
        recorder = tracing.run.StepRecorder(hardware, WireCounter())
        with recording(recorder), recorder:
            function()
        cost = recorder.cost.total(tracing.costs.ONCE)
        return cost.launches, cost.moved, cost.flops

    return launches


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_bytes_and_launches_of_operations(launches_of):
    x, w, b = meta(32, 64), meta(64, 48), meta(48)
    product = (32 * 64 + 64 * 48 + 32 * 48) * BF16
    assert launches_of(lambda: x @ w) == (1, product, 2 * 32 * 64 * 48)
    assert launches_of(lambda: x.float()) == (1, 32 * 64 * (BF16 + FP32), 0)
    assert launches_of(lambda: x.to(torch.float8_e4m3fn)) == (1, 32 * 64 * (BF16 + 1), 0)
    assert launches_of(lambda: x.add_(1.0)) == (1, 32 * 64 * 2 * BF16, 0)
    assert launches_of(lambda: x.copy_(x.clone())) == (2, 32 * 64 * 4 * BF16, 0)
    assert launches_of(lambda: x.t().contiguous()) == (1, 32 * 64 * 2 * BF16, 0)
    # A broadcast operand is read once, an operand that is given twice as well.
    assert launches_of(lambda: meta(32, 48).add_(b)) == (1, (2 * 32 * 48 + 48) * BF16, 0)
    assert launches_of(lambda: x * x) == (1, 2 * 32 * 64 * BF16, 0)


def test_views_and_empty_tensors_are_free(launches_of):
    x = meta(32, 64)

    def views():
        x.t().unsqueeze(0).expand(3, 64, 32)[1, :4].view(torch.int16)
        x.view(8, 4, 64).chunk(2)
        torch.empty_like(x)
        x[:0].add_(1.0)

    assert launches_of(views) == (0, 0, 0)


def test_operations_of_several_kernels(launches_of):
    x, mask = meta(32, 64), meta(32, 64, dtype=torch.bool)
    of_x = 32 * 64 * BF16
    assert launches_of(lambda: x.masked_fill(mask, 0.0)) == (2, 4 * of_x + 32 * 64, 0)
    half = x.requires_grad_()[:, :32]
    # Ones for the upstream gradient; zeros and the copy of the half into them.
    assert launches_of(lambda: half.backward(half)) == (2, of_x + 2 * of_x // 2, 0)


def test_backward_is_included(launches_of):
    x, w = meta(32, 64).requires_grad_(), meta(64, 48).requires_grad_()
    dy = meta(32, 48)
    _, _, flops = launches_of(lambda: (x @ w).backward(dy))
    assert flops == 3 * 2 * 32 * 64 * 48


def test_attention_is_one_launch_each_way_and_half_masked(tracing, hardware):
    """Under a function mode, in which the backward of a loss stays."""
    recorder = tracing.run.StepRecorder(hardware, WireCounter())
    q = meta(2, 4, 128, 64).requires_grad_()
    with tracing.run.FusedOperations(), recorder:
        attention = torch.nn.functional.scaled_dot_product_attention
        y = attention(q, q, q, dropout_p=0.0, is_causal=True, enable_gqa=False)
        forward = recorder.cost.total(tracing.costs.ONCE)
        y.backward(meta(*y.shape))
    assert (forward.launches, forward.flops) == (1, 4 * 2 * 4 * 128 * 128 * 64 / 2)
    both = recorder.cost.total(tracing.costs.ONCE)
    assert both.flops == 3.5 * forward.flops
    assert both.launches == 1 + 1 + 2  # and the sums of the three gradients of q


def test_a_declared_launch_counts_as_it_says(launches_of, tracing):
    x = meta(32, 64)
    assert launches_of(lambda: declare_launch("cast", [x, x], [x])) == (1, 3 * x.nbytes, 0)


def test_seconds_of_a_launch(tracing, tmp_path):
    text = H200.read_text().replace("efficiency: {}", "efficiency: {transpose: 0.1}")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    hardware, launch = tracing.Hardware.read(path), tracing.launches.Launch
    rate, peak = hardware.memory_tb_per_s * 1e12, hardware.fp8_tflops * 1e12
    moved = launch("copy_", 10**9, 10**9)
    assert hardware.seconds(moved, "cast") == pytest.approx(2e9 / rate)
    assert hardware.seconds(moved, "transpose") == pytest.approx(2e10 / rate)
    declared = launch("cast_transpose", 10**9, 10**9, declared=True)
    assert hardware.seconds(declared, "transpose") == pytest.approx(2e9 / rate)
    product = launch("_scaled_mm", 10**9, 0, 10**15, "fp8")
    assert hardware.seconds(product, "gemm") == pytest.approx(1e15 / peak)
    assert hardware.seconds(launch("fill_", 0, 4), "cast") == hardware.smallest_kernel_us * 1e-6


@pytest.mark.parametrize("line", ["memory_tb_per_s: 0", "unknown: 1", "efficiency: {moon: 0.5}"])
def test_hardware_that_makes_no_sense(tracing, tmp_path, line):
    key = line.partition(":")[0]
    kept = [text for text in H200.read_text().splitlines() if not text.startswith(key)]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(InputError, match=key):
        tracing.Hardware.read(path)


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_hardware_files_are_read(tracing, name):
    assert name.upper() in tracing.Hardware.read(ROOT / f"configs/hardware/{name}.yaml").name


def test_layers_scale_exactly(traced):
    one, two, three = (traced("bf16", layers) for layers in (1, 2, 3))
    predicted = one + (two - one).times(2)
    assert predicted.costs.keys() == three.costs.keys()
    for key, cost in three.costs.items():
        assert list(predicted.costs[key].values()) == pytest.approx(list(cost.values())), key


def test_first_and_last_layers_are_not_counted_as_others(tracing, traced, hardware):
    overrides = [*SMALL, "precision.first_last_layers_bf16=true", "train.global_batch_size=2"]
    predicted = tracing.predict(str(GPT_7B), overrides, "te", hardware, 1)
    plain, further = traced("te", 2) - traced("te", 1), tracing.costs.FURTHER
    assert predicted.layer.total(further).launches == plain.total(further).launches
    dense = traced("bf16", 2) - traced("bf16", 1)
    # Around layers in BF16: nobody asks for the amax of the gradient that the final norm returns.
    ends = (traced("bf16", 1) - dense).total(further)
    apart = plain.total(further).launches - dense.total(further).launches
    assert predicted.ends.total(further).launches == ends.launches - 2 * apart


@pytest.mark.parametrize("preset", ["bf16", "te", "o3", "o3_long"])
def test_every_operation_has_a_purpose(tracing, traced, preset):
    cost = traced(preset, 1)
    for phase in tracing.costs.PHASES:
        assert tracing.purposes.OTHER not in cost.by_purpose(phase)


def test_triton_kernels_declare_what_they_move(tracing, traced):
    pytest.importorskip("triton")
    place, further = tracing.purposes, tracing.costs.FURTHER
    fused = traced("o3", 1, kernels="triton").by_purpose(further)
    eager = traced("o3", 1, kernels="hopper").by_purpose(further)
    assert place.OTHER not in fused
    assert fused[place.ACCUMULATE].moved < eager[place.ACCUMULATE].moved / 2
    assert fused[place.GEMM] == eager[place.GEMM]


def test_flops_of_a_layer(tracing, traced):
    """Three products per matrix: forward, dgrad, wgrad."""
    layer = traced("o3", 2) - traced("o3", 1)
    for phase in (tracing.costs.FIRST, tracing.costs.FURTHER):
        gemm = layer.by_purpose(phase)[tracing.purposes.GEMM]
        assert (gemm.launches, gemm.flops) == (12, 6 * BATCH * SEQUENCE * P)


def test_gradients_are_added_in_further_micro_batches(tracing, traced):
    """In fp32: the first copies dw; the others read dw and the sum, and write the sum."""
    layer, place = traced("bf16", 2) - traced("bf16", 1), tracing.purposes.ACCUMULATE
    vectors = (4 + 9) * HIDDEN  # weights and biases of two norms; biases of four layers
    moved = layer.by_purpose(tracing.costs.FURTHER)[place].moved
    assert moved == (P + vectors) * (BF16 + 2 * FP32)
    assert layer.by_purpose(tracing.costs.FIRST)[place].moved > P * (BF16 + FP32)


def test_recomputation_runs_forward_twice(tracing, traced):
    further, place = tracing.costs.FURTHER, tracing.purposes
    plain = traced("te", 1).by_purpose(further)
    recomputed = traced("te", 1, "train.recompute_granularity=full").by_purpose(further)
    again = recomputed[place.GEMM].flops - plain[place.GEMM].flops
    assert again == 2 * BATCH * SEQUENCE * P
    assert (plain[place.ATTENTION].launches, recomputed[place.ATTENTION].launches) == (2, 3)


# Again in backward for its graph, two gradients, and the residual path's; or all of them in two.
@pytest.mark.parametrize(("kernels", "launches"), [("hopper", 1 + 1 + 2 + 1), ("triton", 1 + 2)])
def test_launches_of_a_norm(tracing, traced, kernels, launches):
    if kernels == "triton":
        pytest.importorskip("triton")
    llama = ("model.normalization=RMSNorm", "model.swiglu=true", "model.disable_bias_linear=true")
    two, one = (traced("bf16", layers, *llama, kernels=kernels) for layers in (2, 1))
    norm = (two - one).by_purpose(tracing.costs.FURTHER)[tracing.purposes.NORM]
    assert norm.launches == 2 * launches


def test_bytes_that_tensor_parallel_ranks_send(tracing, traced):
    """Ten parts of the hidden states in E4M3 or E5M2, the scales of four sums, four amaxes."""
    layer = traced("o3", 2, *TP8, world_size=8) - traced("o3", 1, *TP8, world_size=8)
    further = layer.total(tracing.costs.FURTHER)
    assert further.sent == 10 * 7 * E // 8 + 4 * 7 * 16 + 4 * 7
    gemm = layer.by_purpose(tracing.costs.FURTHER)[tracing.purposes.GEMM]
    assert gemm.flops == 6 * BATCH * SEQUENCE * P / 8


def test_replicas_reduce_gradients_and_share_the_optimizer(tracing, traced):
    once, place = tracing.costs.ONCE, tracing.purposes
    alone = traced("o3", 2).by_purpose(once)
    shared = traced("o3", 2, "parallel.node_size=8", world_size=4).by_purpose(once)
    assert place.REDUCTION not in alone and shared[place.REDUCTION].sent > 2 * P
    assert shared[place.OPTIMIZER].moved < alone[place.OPTIMIZER].moved / 2


def test_the_floor_of_an_ideally_fused_layer(tracing):
    """Counted by hand for GELU of width 4 h and as many key heads as query heads."""

    def ideal(preset, *overrides):
        config = load_config(GPT_7B, [f"precision.preset={preset}", *SMALL, *overrides])
        return tracing.floor.ideal_bytes(config)

    assert ideal("bf16") == 92 * E + 10 * P
    assert ideal("te") == 140 * E + 10 * P  # weights are cast once a step
    assert ideal("o3") == 140 * E + (7 + 2) * P
    assert ideal("o3", "precision.cache_weight_operands=true") == 140 * E + 7 * P
    assert ideal("o3_long") == 140 * E + (4 + 2) * P
    assert ideal("bf16", *TP8) == (92 / 8 + 8 + 8 / 8) * E + 10 * P / 8


# Launches of a layer and further micro-batch of a rank of eight. Whoever saves some lowers them.
TP_BUDGETS = {
    ("hopper", "o3", True): 1078,
    ("triton", "o3", True): 89,
    ("triton", "o3", False): 89,
    ("triton", "o3_long", True): 85,
    ("triton", "te", True): 87,
    ("triton", "bf16", True): 64,
    ("triton", "bf16", False): 80,
}


@pytest.mark.parametrize(("kernels", "preset", "sequence_parallel"), TP_BUDGETS)
def test_the_budget_of_a_tensor_parallel_layer(tracing, traced, kernels, preset, sequence_parallel):
    if kernels == "triton":
        pytest.importorskip("triton")
    shape = (TP8[0], f"parallel.sequence_parallel={str(sequence_parallel).lower()}")
    two, one = (traced(preset, layers, *shape, world_size=8, kernels=kernels) for layers in (2, 1))
    launches = TP_BUDGETS[kernels, preset, sequence_parallel]
    assert (two - one).total(tracing.costs.FURTHER).launches <= launches


# Launches and bytes of a further micro-batch; bytes per parameter of the optimizer, and launches of
# a step's in all (of a model of two layers).
LAYER_BUDGETS = {
    ("hopper", "o3"): (324, 2_530_877_040, 780, 3558),
    ("triton", "bf16"): (42, 1_192_826_928, 34.1, 130),
    ("triton", "te"): (55, 1_262_311_632, 36.1, 147),
    ("triton", "o3"): (59, 1_224_577_296, 13.1, 176),
}


@pytest.mark.parametrize(("kernels", "preset"), LAYER_BUDGETS)
def test_the_budget_of_a_7b_shaped_layer(tracing, traced, kernels, preset):
    """At a quarter of its width. Whoever makes it cheaper lowers the bounds to the new numbers."""
    if kernels == "triton":
        pytest.importorskip("triton")
    shape = ("model.hidden_size=1024", "model.seq_length=2048")
    shape += ("precision.master_rounding=stochastic",)
    two, one = (traced(preset, layers, *shape, kernels=kernels) for layers in (2, 1))
    further = (two - one).total(tracing.costs.FURTHER)
    launches, moved, of_optimizer, launches_of_optimizer = LAYER_BUDGETS[kernels, preset]
    assert further.launches <= launches
    assert further.moved <= moved
    assert (two - one).total(tracing.costs.ONCE).moved <= of_optimizer * 12 * 1024**2
    assert two.total(tracing.costs.ONCE).launches <= launches_of_optimizer


def test_the_command(run_tool, tmp_path, capsys):
    facts, picture = tmp_path / "step.json", tmp_path / "pictures/step.png"
    options = ("--preset", "o3", "--kernels", "hopper", "--json", facts, "--output", picture)
    layers = ("model.num_layers=6", "train.global_batch_size=8")
    assert run_tool("trace_step", "--config", GPT_7B, *options, *SMALL, *layers) == 0
    shown = json.loads(facts.read_text())
    bf16, o3 = shown["presets"]["bf16"], shown["presets"]["o3"]
    assert shown["hardware"]["memory_tb_per_s"] == 4.3
    assert bf16["ratio_to_bf16"] == 1.0
    ratio = bf16["predicted_ms"]["step"] / o3["predicted_ms"]["step"]
    assert o3["ratio_to_bf16"] == pytest.approx(ratio)
    assert o3["launches_per_layer"] > bf16["launches_per_layer"]
    assert o3["gemm_flops"] == bf16["gemm_flops"] == 6 * BATCH * SEQUENCE * P
    assert o3["hbm_bytes_per_layer"]["accumulate"] > 50 * P
    ms = o3["predicted_ms"]
    microbatches = 4 * (6 * ms["layer"] + ms["ends"])
    assert ms["step"] == pytest.approx(microbatches + ms["once"], rel=0.05)  # the first differs
    host = o3["host"]
    assert host["layer_ms"] == pytest.approx(o3["launches_per_layer"] * 0.01)
    assert host["step_ms"] > 2 * ms["step"]  # of so small a layer
    assert host["ratio_to_bf16"] == pytest.approx(bf16["host"]["step_ms"] / host["step_ms"])
    assert picture.stat().st_size > 10_000
    assert f"{o3['launches_per_layer']}" in capsys.readouterr().out


def test_a_graph_takes_no_time_of_the_host(tracing, hardware):
    """But for what a step does once, which is not captured."""
    cost, once = tracing.costs.StepCost(), tracing.costs.Cost(1000, seconds=0.001)
    cost.add(tracing.costs.FURTHER, "cast", tracing.costs.Cost(100, seconds=0.0005))
    cost.add(tracing.costs.FIRST, "cast", tracing.costs.Cost(50, seconds=0.0006))
    both = []
    for graphs in ("false", "true"):
        config = load_config(GPT_7B, [f"train.enable_cuda_graph={graphs}"])
        none = tracing.costs.StepCost()
        predicted = tracing.Prediction(config, hardware, cost, none, once, 2, 3)
        both.append((predicted.launching_seconds, predicted.step_seconds_of_both))
    launched, replayed = both
    assert launched == pytest.approx((0.001, 0.0012 + 2 * 0.002 + 0.01))  # 10 us each
    assert replayed == pytest.approx((0.0, 0.0012 + 2 * 0.001 + 0.01))


@pytest.mark.parametrize(
    ("key", "value"), [("train.global_batch_size", 4), ("precision.grad_reduce", "fp8_sum")]
)
def test_replicas_that_cannot_be_traced(run_tool, capsys, key, value):
    arguments = ("--replicas", 3, *SMALL, f"{key}={value}", "train.micro_batch_size=1")
    assert run_tool("trace_step", "--config", GPT_7B, *arguments) == 2
    assert key in capsys.readouterr().err
