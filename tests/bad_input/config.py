"""Configs: files, keys, values, and combinations that are impossible."""

from __future__ import annotations

from tests.bad_input.cases import run, train, writes

TP2 = "parallel.tensor_model_parallel_size=2"
PLAIN = "parallel.use_distributed_optimizer=false"
PP2 = "parallel.pipeline_model_parallel_size=2"
GRAPHS = "train.enable_cuda_graph=true"
SAVE = "checkpoint.save=ck"


def config_file(content, says):
    return run("pretrain_gpt", "--config", "c.yaml", says=says, prepare=writes(c__yaml=content))


FILES = [
    run("pretrain_gpt", says=("no config: pretrain_gpt.py --config FILE.yaml",)),
    run("pretrain_gpt", "--config", says="expected one argument; see pretrain_gpt.py --help"),
    run("pretrain_gpt", "--config", "no.yaml", says="config file no.yaml does not exist"),
    run("pretrain_gpt", "--config", ".", says=("config file . ", "directory")),
    config_file("model: [", "c.yaml:1: not valid YAML"),
    config_file("model: {a: 1, a: 2}", "c.yaml:1: not valid YAML: key 'a' is given twice"),
    config_file("model: {a: !!int b}", ("c.yaml:1: ", "'b'", "int")),
    config_file("\n\na: &b [*b]", ("c.yaml:3: ", "alias")),
    config_file("[" * 3000, "c.yaml: not valid YAML: nested too deeply"),
    config_file("a: &a {}\nmodel: {<<: *a}", "c.yaml:2: not valid YAML: merge keys (<<)"),
    config_file("- 1\n- 2", ("c.yaml", "sections", "[1, 2]")),
    config_file(b"model: \xff", "config file c.yaml is not UTF-8 text"),
    config_file("base: no.yaml", ("no.yaml does not exist", "c.yaml")),
    config_file("base: no.yaml\nmodel: {hiden_size: 3}", ("no.yaml", "model.hiden_size")),
    config_file("base: 3", ("c.yaml: base = 3: ", "file name")),
    config_file("base: c.yaml", ("cycle", "c.yaml -> c.yaml")),
    config_file("", ("model.num_layers is missing", "train.micro_batch_size is missing")),
    config_file("model: 7", ("model = 7: ", "section")),
]

KEYS = [
    train("--train.seed=3", says="unknown option --train.seed=3: write train.seed=3"),
    train("--verbose", says="unknown option --verbose: see pretrain_gpt.py --help"),
    train("--train.seed", "3", says="unknown option --train.seed: write train.seed=3"),
    train("precision=bf16", says="precision.preset=bf16"),
    train("--fp16", says=("precision.preset=bf16", "o3")),
    train("--bf16", "--swiglu", says="write precision.preset=bf16 model.swiglu=true"),
    train("train.seed", "3", says="override 'train.seed': write train.seed=3"),
    train("parallel.context_parallel_size=2", says="not here (context parallelism): drop it"),
    train("model.num_experts=8", says="not here (mixture of experts): drop it"),
    train("train.bf16=true", says="unknown key train.bf16: here it is precision.preset=bf16"),
    train("train.objective=rl", says='train.objective = "rl": expected'),
    train("--sft", says="unknown option --sft: write train.objective=sft"),
    train("tuning.packing=false", says="tuning.packing = False is for train.objective = sft"),
    train("train.objective=sft", "tuning.beta=1", says="is for train.objective = dpo, not sft"),
    train("train.objective=dpo", "tuning.packing=false", says="separates the answers of a pair"),
    train("train.objective=dpo", "tuning.beta=0", says="tuning.beta = 0: expected"),
    train("train.objective=dpo", "tuning.label_smoothing=0.5", says="tuning.label_smoothing = 0.5"),
    train(
        *("train.objective=dpo", "tuning.label_smoothing=0.1", "tuning.loss_type=ipo"),
        says="is for tuning.loss_type = sigmoid, not ipo",
    ),
    train(
        *("train.objective=dpo", "train.calculate_per_token_loss=false"),
        says="every pair counts the same",
    ),
    train("train.objective=sft", "data.eod_mask_loss=true", says="answers alone count"),
    train("precision.wire.dispatch=fp8", says="not here (mixture of experts): drop it"),
    train("checkpoint.save=$NOT_SET/ck", says="checkpoint.save: the variable NOT_SET of the"),
    train("checkpoint.save=~nobody_here/ck", says="write ./~nobody_here for a folder"),
    train("train.seed", says="override 'train.seed': write it as section.key=value"),
    train("seed=3", says="unknown key seed: did you mean train.seed?"),
    train(
        "train.trian_iters=3", says="unknown key train.trian_iters: did you mean train.train_iters?"
    ),
    train("trian.seed=3", says="unknown key trian: did you mean train?"),
    train("train.seed.low=3", says='train.seed = {"low": 3}: expected integer >= 0'),
    train("train.seed=[", says="override 'train.seed=[': not a YAML value"),
    train("train.seed=!!int abc", says="not a YAML value ('abc' cannot be read as int); quote it"),
    train("optimizer.lr=!!float abc", says=("'abc'", "float")),
    train("optimizer.lr=!!float ''", says=("''", "float")),
    train("train.device=!!timestamp abc", says=("'abc'", "timestamp")),
    train("model.swiglu=!!bool abc", says=("'abc'", "bool")),
    train("train.seed=" + "9" * 5000, says=("override 'train.seed=999", "cannot be read as int")),
    train("train.seed=" + "[" * 3000, says="[[...': not a YAML value (nested too deeply)"),
    train("train.seed=&a [*a]", says="alias"),
    train("train.seed=3", "train.seed.low=1", says="override 'train.seed.low=1': seed was given"),
    train("precision.wire.gather=int8", says='precision.wire.gather = "int8": expected fp8 | bf16'),
    train("precision.wire.gathre=fp8", says="unknown key precision.wire.gathre: did you mean"),
]

VALUES = [
    train("train.seed=abc", says='train.seed = "abc": expected integer >= 0'),
    train("train.seed=-1", says="train.seed = -1: expected integer >= 0"),
    train("train.seed=1.5", says="train.seed = 1.5: expected integer >= 0"),
    train("train.seed=true", says="train.seed = true: expected integer >= 0"),
    train('optimizer.lr="fast"', says='optimizer.lr = "fast": expected number > 0'),
    train('optimizer.lr="0.1"', says='optimizer.lr = "0.1": expected number > 0'),
    train("optimizer.lr=0", says="optimizer.lr = 0: expected number > 0"),
    train("optimizer.lr=.inf", says="optimizer.lr = Infinity: expected number > 0"),
    train("optimizer.lr=.nan", says="optimizer.lr = NaN: expected number > 0"),
    train("optimizer.adam_beta1=1", says="optimizer.adam_beta1 = 1: expected number >= 0 and < 1"),
    train("model.swiglu=1", says="model.swiglu = 1: expected true | false"),
    train("model.num_layers=null", says="model.num_layers = null: expected integer >= 1"),
    train(
        "checkpoint.save=", says="override 'checkpoint.save=' has no value: checkpoint.save=null"
    ),
    train(
        "precision.preset=fp4", says='precision.preset = "fp4": expected bf16 | te | o1 | o2 | o3'
    ),
    train("train.device=tpu", says='train.device = "tpu": expected auto | cpu | cuda'),
    train("data.data_path=[true]", says="data.data_path = [true]: expected list of"),
    train("train.rampup_batch_size=[4]", says="train.rampup_batch_size = [4]: expected ["),
    train(
        "train.exit_duration_in_mins=0", says="train.exit_duration_in_mins = 0: expected number > 0"
    ),
    train("parallel.distributed_timeout_minutes=-1", says="expected number > 0"),
    train("checkpoint.keep_last=0", says="checkpoint.keep_last = 0: expected integer >= 1"),
    train(
        "checkpoint.ckpt_format=zarr", says='checkpoint.ckpt_format = "zarr": expected torch_dist'
    ),
    train("checkpoint.save=''", says='checkpoint.save = "": expected text'),
]

MODEL = [
    train("model.num_attention_heads=7", says="is not divisible by model.num_attention_heads = 7"),
    train("model.num_query_groups=3", says="not divisible by model.num_query_groups = 3"),
    train("model.seq_length=4096", "model.max_position_embeddings=64", says="is longer than"),
    train(
        "data.reset_attention_mask=true",
        "model.attention_dropout=0.1",
        "train.device=auto",
        says=("data.reset_attention_mask = true", "set model.attention_dropout=0"),
    ),
    train(
        "data.reset_position_ids=true",
        "model.position_embedding_type=none",
        says=("data.reset_position_ids = true", "drop it"),
    ),
    train("model.kv_channels=15", says="RoPE rotates pairs of channels"),
    train("model.hidden_size=72", says=("model.hidden_size = 72", "multiple of 16")),
    train("model.ffn_hidden_size=100", says=("model.ffn_hidden_size = 100", "multiple of 16")),
    train("model.seq_length=10", "train.micro_batch_size=1", says="model.seq_length * train.micro"),
    train("model.num_query_groups=1", "model.kv_channels=4", says="the width of queries, keys and"),
]

TRAINING = [
    train("train.micro_batch_size=3", says="is not divisible by train.micro_batch_size = 3"),
    train("train.train_samples=64", "train.train_iters=4", says="both are set"),
    train(
        "train.train_iters=null", says="exactly one of train.train_iters and train.train_samples"
    ),
    train("train.train_samples=8", says="train.global_batch_size = 16"),
    train("train.rampup_batch_size=[4,4,64]", says="train.train_samples"),
    train("train.train_samples=640", "train.rampup_batch_size=[4,5,64]", says="does not reach"),
    train(
        "train.train_samples=640", "train.rampup_batch_size=[6,5,64]", says="must be multiples of"
    ),
    train("optimizer.min_lr=1", says="optimizer.min_lr = 1 is greater than optimizer.lr = 0.001"),
    train("scheduler.lr_warmup_init=1", says="scheduler.lr_warmup_init = 1 is greater than"),
    train("scheduler.lr_warmup_iters=99", says="the decay's 50"),
    train("scheduler.lr_decay_samples=99", says="use scheduler.lr_decay_iters"),
    train("scheduler.lr_decay_style=WSD", says="needs scheduler.lr_wsd_decay_iters"),
    train(
        "scheduler.lr_wsd_decay_iters=5", says="needs scheduler.lr_decay_style = WSD, not cosine"
    ),
    train(
        "scheduler.lr_decay_style=WSD",
        "scheduler.lr_wsd_decay_iters=51",
        says="the schedule's 50",
    ),
    train(
        "train.loss_spike_threshold=1",
        says="needs checkpoint.save and checkpoint.save_interval",
    ),
    train(
        "train.loss_spike_threshold=1",
        SAVE,
        "checkpoint.save_interval=5",
        "checkpoint.keep_last=1",
        says="needs checkpoint.keep_last of 2 or more",
    ),
    train(
        "train.loss_spike_threshold=1",
        SAVE,
        "checkpoint.save_interval=1",
        "checkpoint.keep_last=2",
        says="needs checkpoint.keep_last of 3 or more: the last 2 may be of the 3 steps",
    ),
    train("checkpoint.save_interval=5", says="checkpoint.save_interval = 5 needs checkpoint.save"),
    train(GRAPHS, "train.device=cpu", says="= true needs a GPU, and train.device = cpu: set tra"),
    train(GRAPHS, "train.device=auto", says="enable_cuda_graph = true needs a GPU, and this proc"),
    train(GRAPHS, PP2, says="set parallel.pipeline_model_parallel_size=1, or train.enable_cuda_gr"),
    train(GRAPHS, "parallel.overlap_param_gather=true", says="set parallel.overlap_param_gather=f"),
    train(GRAPHS, "model.attention_dropout=0.1", says="set model.attention_dropout=0 instead of 0"),
    train(GRAPHS, "data.reset_attention_mask=true", says="with data.reset_attention_mask docu"),
    train(GRAPHS, "train.objective=sft", says="with tuning.packing documents of other lengths"),
    train(GRAPHS, "train.objective=dpo", says="with train.objective = dpo documents of other len"),
]

SOURCES = [
    train(
        "data.mock_data=false", says="no data: set data.data_path=[PREFIX] or data.mock_data=true"
    ),
    train("data.mock_data=true", "data.data_path=[a]", says="reads no files: drop data.data_path"),
    train("data.data_path=[0.5,a,b]", says="expected [prefix], [weight1, prefix1, weight2"),
    train("data.data_path=[0.5,a,0.5]", says="expected [prefix], [weight1, prefix1"),
    train("data.data_path=[-1,a]", says='data.data_path = [-1, "a"]: expected list of'),
    train("data.data_path=[.nan,a]", says="data.data_path"),
    train("data.data_path=[.inf,a]", says="data.data_path"),
    train("data.data_path=['1',a,'2',b]", says="without quotes"),
    train(
        "data.mock_data=false",
        "data.data_path=[a]",
        "train.seed=4294967296",
        says=("train.seed = 4294967296", "too large"),
    ),
    train(
        "data.data_path=[0,a,0,b]",
        says=("data.data_path = [0.0, 'a', 0.0, 'b']", "weight of 0"),
    ),
    train("data.split=most", says=('data.split = "most"', "three shares")),
    train("data.split='0,1,0'", says="three shares"),
    train("data.split='1,-1'", says="three shares"),
    train("tokenizer.vocab_size=null", says="NullTokenizer needs tokenizer.vocab_size"),
    train(
        "tokenizer.tokenizer_model=t", says="NullTokenizer has no tokenizer.tokenizer_model: drop t"
    ),
    train(
        "tokenizer.tokenizer_type=SentencePieceTokenizer", says="needs tokenizer.tokenizer_model"
    ),
    train(
        "tokenizer.tokenizer_type=HuggingFaceTokenizer",
        "tokenizer.tokenizer_model=t",
        "tokenizer.vocab_size=9",
        says="knows its size: drop tokenizer.vocab_size = 9",
    ),
]

PRECISION = [
    train(
        "precision.gemm=bf16", says="params_dtype = fp8_e4m3 needs precision.gemm = fp8, not bf16"
    ),
    train("precision.main_params_dtype=none", says="needs a master weight"),
    train("precision.scaling.input=block", says="expected tensor | row | block_1x128"),
    train(
        "precision.scaling_method=delayed",
        "precision.scaling.input=row",
        says="delayed has one scale per tensor, but precision.scaling.input = row",
    ),
    train("precision.smooth_swiglu=true", says="precision.smooth_swiglu = true needs model.swiglu"),
    train(
        "precision.preset=bf16",
        "precision.smooth_swiglu=true",
        "model.swiglu=true",
        says="smooth_swiglu = true is for FP8: precision.gemm = bf16",
    ),
    train("precision.fp8_margin=200", says="precision.fp8_margin = 200: expected integer"),
    train("precision.fp8_amax_history_len=0", says="fp8_amax_history_len"),
    train("precision.scaling.weights=row", says="unknown key precision.scaling.weights: did you"),
    train("precision.scaling.weight=row", says="stores it with one scale: use tensor, or params_"),
    train(
        "precision.preset=mxfp8",
        "model.ffn_hidden_size=96",
        "parallel.tensor_model_parallel_size=2",
        says="/ parallel.tensor_model_parallel_size = 2 is 48, which cuts blocks of 32 "
        "(precision.scaling.input): use a multiple of 64",
    ),
    train("precision.preset=te", "precision.wire.params=fp8", says="wire.params = fp8 needs"),
    train(
        "precision.main_grads_dtype=fp32",
        "precision.grad_reduce=fp8_sum",
        says="adds gradients in E4M3, but precision.main_grads_dtype = fp32",
    ),
    train(
        "precision.preset=bf16",
        "precision.main_grads_dtype=fp8_e2m5",
        "model.hidden_size=40",
        says="model.hidden_size = 40 is not a multiple of 16, which blocks of gradients need",
    ),
    *(
        train(
            "parallel.node_size=2",
            f"precision.grad_reduce={kind}",
            says=f"parallel.node_size = 2 is for precision.grad_reduce = fp32_accumulate, which "
            f"alone sums on machines first, not {kind}",
        )
        for kind in ("fp8_sum", "fp8_pre_scaling", "fp8_post_scaling")
    ),
]

LAYOUTS = [
    train("parallel.sequence_parallel=true", says="needs parallel.tensor_model_parallel_size > 1"),
    train("parallel.tensor_model_parallel_size=3", says="model.num_attention_heads = 4 is not div"),
    train(
        "parallel.tensor_model_parallel_size=4",
        "model.num_attention_heads=12",
        "model.num_query_groups=3",
        "model.hidden_size=192",
        says="model.num_query_groups = 3 and parallel.tensor_model_parallel_size = 4: one must be",
    ),
    train(
        "parallel.tensor_model_parallel_size=4",
        "model.num_query_groups=1",
        "model.kv_channels=16",
        says="= 96 / parallel.tensor_model_parallel_size = 4 is 24, not a multiple of 16",
    ),
    train(
        "parallel.tensor_model_parallel_size=4",
        "model.num_query_groups=1",
        "model.kv_channels=1",
        "model.position_embedding_type=none",
        "precision.preset=bf16",
        says="the width of queries, keys and values (model.num_query_groups, model.kv_channels)",
    ),
    train(TP2, "model.ffn_hidden_size=80", says="= 2 is 40, not a multiple of 16"),
    train(
        "parallel.decoder_first_pipeline_num_layers=1", says="needs parallel.pipeline_model_para"
    ),
    train("parallel.pipeline_model_parallel_size=3", says="do not divide evenly"),
    train(PP2, "parallel.num_layers_per_virtual_pipeline_stage=3", says="is not divisible by"),
    train(
        PP2,
        "parallel.num_layers_per_virtual_pipeline_stage=1",
        "parallel.pipeline_schedule=zb-h1",
        says="has a schedule of its own",
    ),
    train("parallel.pipeline_schedule=zb-h1", says="zb-h1 needs parallel.pipeline_model_parallel"),
    train(PLAIN, "parallel.partition=even", says="parallel.partition = even"),
    train(PLAIN, "parallel.overlap_param_gather=true", says="true has nothing to gather"),
    train("parallel.pipeline_schedule=dualpipe", says='"dualpipe": expected 1f1b | zb-h1'),
    train("parallel.partition=rows", says='parallel.partition = "rows": expected tensor | even'),
]

CASES = [
    *FILES,
    *KEYS,
    *VALUES,
    *MODEL,
    *TRAINING,
    *SOURCES,
    *PRECISION,
    *LAYOUTS,
]
