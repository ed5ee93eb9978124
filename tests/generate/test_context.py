"""A cache changes no token: against reading all again, alone, in batches, on several ranks."""

from __future__ import annotations

import pytest
import torch

from fp8lm.generate.context import CachedContext, RecomputedContext
from fp8lm.generate.decoding import complete
from fp8lm.layers.param import named_params
from tests.generate.models import PROMPTS, greedy, greedy_tokens, loaded

CASES = [
    ("llama", "fp32", "auto"),
    ("llama", "fp32", "fp8"),
    ("llama", "bf16", "auto"),
    ("llama", "o3", "auto"),
    ("gpt", "te", "auto"),
    ("llama", "o3", "fp8"),
]


OTHER_SCALES = [("llama", preset, "auto") for preset in ("te_delayed", "unit", "deepseek")]
SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in [*CASES[:-1], *OTHER_SCALES]]


@pytest.mark.parametrize(("shape", "precision", "cache_dtype"), [CASES[-1], *SLOW])
def test_cache_and_batch_change_no_token(checkpoint, shape, precision, cache_dtype):
    folder = checkpoint(shape, precision)
    cached = greedy_tokens(folder, 1, 1, True, cache_dtype)
    assert len({token for tokens in cached for token in tokens}) > 20  # no loop that any model runs
    assert greedy_tokens(folder, 1, 1, False, cache_dtype) == cached
    alone = [greedy_tokens(folder, 1, 1, True, cache_dtype, [prompt])[0] for prompt in PROMPTS]
    assert alone == cached


def layouts(folder, tp, pp, cache_dtype):
    return [
        greedy_tokens(folder, tp, pp, use_cache, cache_dtype, count=16)
        for use_cache in (True, False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize(("shape", "precision", "cache_dtype"), CASES)
def test_under_layouts(run_distributed, checkpoint, tp, pp, shape, precision, cache_dtype):
    folder = checkpoint(shape, precision)
    results = run_distributed(layouts, tp * pp, folder, tp, pp, cache_dtype)
    assert all(result == results[0] for result in results)
    cached, recomputed = results[0]
    assert cached == recomputed
    # Stages send what they computed. Ranks of a layer add partial sums in another order, and scale
    # their own features of a token: the same in FP32 only, where roundings are small.
    if tp == 1 or precision == "fp32":
        assert cached == greedy_tokens(folder, 1, 1, True, cache_dtype, count=16)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["llama", "gpt"])
def test_a_vocabulary_that_ranks_do_not_divide(run_distributed, checkpoint, shape):
    """Its 101 stored rows are padded to 102."""
    folder = checkpoint(shape, "fp32", make_vocab_size_divisible_by=101)
    results = run_distributed(layouts, 2, folder, 2, 1, "auto")
    assert results == [[greedy_tokens(folder, 1, 1, True, count=16)] * 2] * 2


@pytest.mark.parametrize("kind", [CachedContext, RecomputedContext])
def test_a_context_is_cut_and_read_on(checkpoint, kind):
    with loaded(checkpoint("llama", "o3")) as model:
        straight = kind(model, 2, 32)
        expected = straight.extend([[1, 2, 3, 4], [5, 6]])
        context = kind(model, 2, 32)
        context.extend([[1, 2, 9, 9, 9], []])
        context.cut(0, 2)
        assert context.lengths == [2, 0]
        assert torch.equal(context.extend([[3, 4], [5, 6]]), expected)
        assert context.lengths == [4, 2]


def test_logits_are_those_of_the_training_model(checkpoint):
    """Packed, cached and on its own tokens, an FP32 model computes what the plain model does."""
    with loaded(checkpoint("llama", "fp32")) as model:
        tokens = torch.tensor([[*PROMPTS[2], *PROMPTS[0]]])
        whole = model.chunks[0](tokens)[:, 0, : model.num_ids]
        context = CachedContext(model, 1, 64)
        for size, token in enumerate(tokens[0].tolist(), 1):
            step = context.extend([[token]])[0]
            torch.testing.assert_close(step, whole[size - 1], rtol=1e-5, atol=1e-4)


def test_long_prompts_are_read_in_parts(checkpoint, monkeypatch):
    prompts = [PROMPTS[2], PROMPTS[0], [7] * 50]
    folder = checkpoint("llama", "bf16")
    whole = greedy_tokens(folder, 1, 1, True, prompts=prompts, count=10)
    monkeypatch.setattr("fp8lm.generate.model.MOST_TOKENS", 24)
    assert greedy_tokens(folder, 1, 1, True, prompts=prompts, count=10) == whole


def test_nothing_is_held_for_training(checkpoint):
    with loaded(checkpoint("llama", "o3")) as model:
        weights = named_params(model.chunks[0])
        assert not any(weight.spec.trainable for weight in weights.values())
        with pytest.raises(RuntimeError, match="frozen"):
            next(iter(weights.values())).main_grad  # noqa: B018
        (done,) = complete(model, [[1, 2]], greedy(4))
        assert len(done.tokens) == 4
        cache = model.new_cache(2, 10, "fp8")
        # Keys and values of 2 layers: 21 slots of 2 groups, 16 bytes and a scale each.
        assert cache.nbytes == 2 * 2 * 21 * 2 * (16 + 4)
