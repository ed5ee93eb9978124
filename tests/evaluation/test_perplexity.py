"""Perplexity against a loop of one's own, its windows and errors, on one rank and on several."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fp8lm.data.indexed_writer import IndexedWriter
from fp8lm.data.tokenizer import NullTokenizer
from fp8lm.evaluation.perplexity import Corpus, Perplexity, perplexity, read_corpus
from fp8lm.evaluation.scoring import Passage, score_all, windows
from fp8lm.evaluation.statistics import per_token
from fp8lm.runtime.errors import InputError
from tests.generate.models import loaded

GENERATOR = torch.Generator().manual_seed(5)
DOCUMENTS = [
    torch.randint(0, 99, (size,), generator=GENERATOR).tolist() for size in (70, 5, 1, 33, 64)
]
CORPUS = Corpus.of(DOCUMENTS, [" ".join(map(str, ids)) for ids in DOCUMENTS])
TOKENIZER = NullTokenizer(99)
PREFIX = TOKENIZER.eod


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_windows_score_every_token_once(count, window, stride):
    stride = min(stride, window)
    tokens = list(range(count))
    scored = []
    for number, passage in enumerate(windows(tokens, PREFIX, window, stride)):
        assert 1 <= passage.scored <= (window if number == 0 else stride)
        scored += passage.tokens[-passage.scored :]
        last = passage.tokens[-1]
        # At most `window` tokens are read: all that there are, if they are fewer.
        assert passage.tokens == [PREFIX, *tokens][max(0, last + 1 - window) : last + 2]
    assert scored == tokens


def direct_loss(model, window, stride):
    """Nats per token from logits of one window at a time, of the model as it trains."""
    nats, count = 0.0, 0
    for ids in DOCUMENTS:
        whole, done = [PREFIX, *ids], 0
        while done < len(ids):
            size = min(window if done == 0 else stride, len(ids) - done)
            done += size
            read = whole[max(0, done - window) : done + 1]
            logits = model.chunks[0](torch.tensor([read[:-1]]))[-size:, 0, : model.num_ids]
            target = torch.tensor(read[-size:])
            nats += functional.cross_entropy(logits.double(), target, reduction="sum").item()
            count += size
    return nats / count


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (32, 8), (7, 3), (16, 1)])
@pytest.mark.parametrize("shape", ["llama", "gpt"])
def test_is_that_of_a_direct_loop(checkpoint, shape, window, stride):
    with loaded(checkpoint(shape, "fp32")) as model:
        found = perplexity(model, CORPUS, window, stride, batch_size=3)
        assert found.loss.value == pytest.approx(direct_loss(model, window, stride), rel=1e-6)
        assert sum(found.tokens) == sum(map(len, DOCUMENTS))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "o3"])
def test_neighbours_in_a_batch_change_no_bit(checkpoint, precision):
    """Nothing of them is read. (Batches of other sizes may take other GEMM kernels.)"""
    passages = [Passage([PREFIX] + [token] * 16, 16) for token in range(0, 99, 7)]
    with loaded(checkpoint("llama", precision)) as model:
        mixed = Passage([PREFIX, *DOCUMENTS[0][:16]], 16)
        first, *others = (score_all(model, [mixed, p], 2)[0] for p in passages)
    assert all(torch.equal(first.losses, other.losses) for other in others)


def test_batches_change_nothing(checkpoint):
    with loaded(checkpoint("llama", "fp32")) as model:
        alone, batched = (perplexity(model, CORPUS, 32, 16, size) for size in (1, 100))
    assert alone.nats == pytest.approx(batched.nats, rel=1e-6)  # sums in another order


def losses(folder, tp, pp):
    with loaded(folder, tp, pp) as model:
        return perplexity(model, CORPUS, 32, 16, 4).nats


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tp", "pp"), [(2, 2, 1), (2, 1, 2), (2, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("o3", 0.1)])
def test_under_layouts(run_distributed, checkpoint, ranks, tp, pp, precision, bound):
    folder = checkpoint("llama", precision)
    results = run_distributed(losses, ranks, folder, tp, pp)
    assert all(result == results[0] for result in results)
    alone = losses(folder, 1, 1)
    assert results[0] == (alone if tp == 1 else pytest.approx(alone, rel=bound))


def test_equals_transformers(checkpoint, tmp_path):
    pytest.importorskip("transformers")
    from tests.evaluation.hugging_face import exported

    folder = checkpoint("llama", "fp32")
    other = exported(folder, tmp_path / "hf")
    with loaded(folder) as model:
        found = perplexity(model, CORPUS, 64, 64, 4)
        nats = []
        for ids in DOCUMENTS:
            for read in windows(ids, PREFIX, 64, 64):
                logits = other(torch.tensor([read.tokens[:-1]])).logits[0, -read.scored :]
                target = torch.tensor(read.tokens[-read.scored :])
                logits = logits[:, : model.num_ids].double()
                nats.append(functional.cross_entropy(logits, target, reduction="sum").item())
    assert found.nats == pytest.approx(nats, rel=1e-5)
    expected = math.exp(sum(nats) / sum(found.tokens))
    assert found.facts()["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_per_byte_and_word():
    found = Perplexity(1, 10, 4, 8, 8, [3.0, 5.0], [4, 4]).facts()
    assert found["loss"] == 1.0 and found["perplexity"] == pytest.approx(math.e)
    assert found["bits_per_byte"] == pytest.approx(8.0 / 10 / math.log(2))
    assert found["byte_perplexity"] == pytest.approx(math.exp(0.8))
    assert found["word_perplexity"] == pytest.approx(math.exp(2.0))
    # Parts of -1 and 1 around the mean: sqrt(2 / 1 * 2) / 8.
    assert found["loss_stderr"] == pytest.approx(0.25)


def test_the_standard_error_is_the_spread_of_repetitions():
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        tokens = torch.randint(5, 50, (40,), generator=generator)
        nats = tokens * 2.0 + torch.randn(40, generator=generator) * tokens.sqrt()
        mean = per_token(nats.tolist(), tokens.tolist())
        means.append(mean.value)
        errors.append(mean.error)
    spread = torch.tensor(means).std().item()
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)
    assert math.isnan(per_token([1.0], [2]).error)


def test_differences_are_paired():
    first = Perplexity(1, 1, 1, 8, 8, [3.0, 9.0, 5.0], [4, 4, 4])
    second = Perplexity(1, 1, 1, 8, 8, [3.4, 9.4, 5.4], [4, 4, 4])
    difference = second.difference(first)
    assert difference.value == pytest.approx(0.1)
    assert difference.error == pytest.approx(0.0, abs=1e-12) and first.loss.error > 0.1
    other = Perplexity(1, 1, 1, 8, 8, [3.0], [12])
    assert first.difference(other) is None


def write_indexed(prefix, documents):
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for document in documents:
            writer.add(np.array(document, np.uint16))
        writer.publish({"tokenizer": TOKENIZER.identity, "append_eod": True})


def test_documents_of_files_and_of_indexed_data(tmp_path):
    prefix, file = tmp_path / "data", tmp_path / "a.jsonl"
    write_indexed(prefix, [[1, 2, 3, 99], [4, 5], [], [99]])
    expected = [[1, 2, 3], [4, 5]]
    corpus = read_corpus(str(prefix), TOKENIZER)
    assert corpus == Corpus(expected, len("1 2 3") + len("4 5"), 5)
    file.write_text('{"text": "1 2 3"}\n{"text": "4 5"}\n{"text": ""}\n')
    assert read_corpus(str(file), TOKENIZER) == corpus
    assert read_corpus(str(file), TOKENIZER, 4).documents == expected[:1]
    assert read_corpus(str(file), TOKENIZER, 1).documents == expected[:1]
    file.write_text(file.read_text().replace("text", "body"))
    with pytest.raises(InputError, match="--json-keys"):
        read_corpus(str(file), TOKENIZER)
    other = file.rename(tmp_path / "b")
    assert read_corpus(str(other), TOKENIZER, input_format="jsonl", key="body") == corpus


@pytest.mark.parametrize(
    ("documents", "complaint"), [([[1, 100]], "token 100"), ([[99]], "no tokens")]
)
def test_data_that_cannot_be_scored(tmp_path, documents, complaint):
    write_indexed(tmp_path / "data", documents)
    with pytest.raises(InputError, match=complaint):
        read_corpus(str(tmp_path / "data"), TOKENIZER)
    with pytest.raises(InputError, match="none"):
        read_corpus(str(tmp_path / "none"), TOKENIZER)


@pytest.mark.parametrize(("window", "stride"), [(65, 1), (8, 9)])
def test_windows_that_do_not_fit(checkpoint, window, stride):
    with loaded(checkpoint("llama", "fp32")) as model, pytest.raises(InputError, match="--"):
        perplexity(model, CORPUS, window, stride, 1)
