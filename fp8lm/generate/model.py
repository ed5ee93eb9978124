"""A trained model that reads token ids and tells the next, under tensor and pipeline parallelism.

Every rank calls the same methods with the same arguments and gets the same results. Between stages
hidden states travel in the dtype of activations, and partial sums of tensor parallelism likewise:
an FP8 wire would give a token the scale of its neighbours.

Shapes: T tokens of several sequences, n of them whose logits are wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fp8lm.comm import Wire, WireCounter, broadcast
from fp8lm.comm.groups import ProcessGroups
from fp8lm.comm.p2p import PipelineP2P
from fp8lm.config import Config
from fp8lm.data.tokenizer import Tokenizer
from fp8lm.generate.kv_cache import CacheShape, KVCache
from fp8lm.generate.packing import TOKENS_PER_TILE, PackedTokens, divide, pack
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.cross_entropy import cross_entropy, likeliest
from fp8lm.layers.param import Param, QuantizedParam, named_params
from fp8lm.layers.tp_context import TPContext
from fp8lm.layers.weight_operands import cached_weight_operands
from fp8lm.model import GPTModel
from fp8lm.numerics import BF16, E4M3, FP32, Format
from fp8lm.scaled_tensor import ScaledTensor

MOST_TOKENS = 1024  # in one forward
MOST_LOGITS = 256  # rows of them at a time
KV_CACHE_DTYPES = ("auto", "fp8")


@dataclass(frozen=True)
class InferenceModel:
    """This rank's part of a model, frozen, with its tokenizer and the config it was trained with.

    `chunks` are this pipeline stage's, of which an interleaved schedule has several: what leaves
    the last stage enters the next chunk of the first. `warnings` name differences from training.
    """

    chunks: Sequence[GPTModel]
    tokenizer: Tokenizer
    config: Config
    groups: ProcessGroups
    kernels: Kernels
    device: torch.device
    warnings: list[str]

    @property
    def context_length(self) -> int:
        """Positions of the model: the most tokens of a sequence."""
        return self.config.model.max_position_embeddings

    @property
    def num_ids(self) -> int:
        """Tokens of the vocabulary, without padding."""
        return self.tokenizer.vocab_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that this rank holds, with copies in the GEMMs' format."""
        held = 0
        for weight in self._weights:
            held += weight.model_param.nbytes
            if isinstance(weight, QuantizedParam) and weight.cache and weight.cache.operand:
                held += weight.cache.operand.nbytes
        return held

    def new_cache(self, sequences: int, capacity: int, dtype: str = "auto") -> KVCache:
        """An empty cache; `dtype` is one of `KV_CACHE_DTYPES`."""
        model = self.config.model
        groups = max(1, model.num_query_groups // self._tp.size)
        shape = CacheShape(sequences, capacity, groups, model.kv_channels)
        layers = [index for chunk in self.chunks for index in chunk.part.layers]
        return KVCache(layers, shape, self._cache_format(dtype), self.kernels, self.device)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Cast weights to the format of their GEMMs once for all that is computed inside."""
        with (
            torch.no_grad(),
            cached_weight_operands(self._weights, self._tp),
        ):
            yield

    def next_logits(
        self, cache: KVCache, starts: Sequence[int], new_tokens: Sequence[list[int]]
    ) -> Tensor:
        """Logits fp32 [n,V] on the CPU of the token after each sequence that has `new_tokens`.

        Sequence i is read on from position `starts[i]`; what is before is in `cache`.
        """
        found: dict[int, Tensor] = {}
        for packed, h_T1H in self._read(cache, starts, new_tokens):
            final = [i for i, piece in enumerate(packed.pieces) if piece.is_final]
            if not final:
                continue
            rows = [packed.ends[i] - 1 for i in final]
            logits = self._on_all_stages(
                partial(self._all_logits, h_T1H, rows), (len(rows), self.num_ids)
            ).cpu()
            found |= {packed.pieces[i].sequence: row for i, row in zip(final, logits, strict=True)}
        return torch.stack([found[sequence] for sequence in sorted(found)])

    def score(
        self, sequences: Sequence[list[int]], counts: Sequence[int]
    ) -> list[tuple[Tensor, Tensor]]:
        """Of the last `counts[i]` tokens of each sequence: losses in nats (fp32), and whether each
        token is the likeliest.

        On the CPU. A sequence has at least one token more, and at most one more than the context.
        """
        inputs = [sequence[:-1] for sequence in sequences]
        cache = self.new_cache(len(inputs), max(map(len, inputs)))
        losses = [torch.zeros(count) for count in counts]
        likeliest = [torch.zeros(count, dtype=torch.bool) for count in counts]
        for packed, h_T1H in self._read(cache, [0] * len(inputs), inputs):
            wanted = list(_wanted(packed, sequences, counts))
            if not wanted:
                continue
            rows, targets, places = zip(*wanted, strict=True)
            scores = self._on_all_stages(
                partial(self._scores, h_T1H, rows, targets), (2, len(targets))
            ).cpu()
            for (sequence, place), (loss, is_likeliest) in zip(places, scores.t(), strict=True):
                losses[sequence][place], likeliest[sequence][place] = loss, is_likeliest > 0
        return list(zip(losses, likeliest, strict=True))

    def _read(
        self, cache: KVCache, starts: Sequence[int], new_tokens: Sequence[list[int]]
    ) -> Iterator[tuple[PackedTokens, Tensor | None]]:
        """Run the layers on groups of `new_tokens`; hidden states [T,1,H] on the last stage."""
        for group in divide(new_tokens, starts, MOST_TOKENS):
            packed = pack(group, cache.shape.capacity, cache.unused_slot, self.device)
            yield packed, self._hidden_states(packed, cache)

    def _hidden_states(self, packed: PackedTokens, cache: KVCache) -> Tensor | None:
        pipeline = self.groups.pipeline_parallel
        shape = (packed.tokens_1T.shape[1], 1, self.config.model.hidden_size)
        wire = Wire("pipeline", "bf16", WireCounter())
        p2p = PipelineP2P(shape, self._dtype, wire, self.kernels)
        stage, stages = pipeline.rank(), pipeline.size()
        for chunk in self.chunks:
            received = None
            if not chunk.part.has_embedding:
                received = p2p.receive((stage - 1) % stages, pipeline, self.device).wait()
            h_T1H = chunk.hidden_states(
                packed.tokens_1T,
                received,
                positions_BS=packed.positions_1T,
                core_of=cache.core_of(packed),
            )
            if chunk.part.has_head:
                return h_T1H
            p2p.send(h_T1H, (stage + 1) % stages, pipeline).wait()
        return None

    def _all_logits(self, h_T1H: Tensor | None, rows: list[int]) -> Tensor:
        """Logits fp32 [n,V] of tokens `rows`, of all ranks that hold a part of the vocabulary."""
        logits = self._logits(h_T1H, rows)[: len(rows)].float().contiguous()
        return self._tp.gather(logits).transpose(0, 1).flatten(1)[:, : self.num_ids]

    def _scores(self, h_T1H: Tensor | None, rows: Sequence[int], targets: Sequence[int]) -> Tensor:
        """Loss of `targets`, read after tokens `rows`, and 1 for the likeliest: fp32 [2,n]."""
        labels = torch.tensor(targets, device=self.device)
        found = []
        for first in range(0, len(targets), MOST_LOGITS):
            part = labels[first : first + MOST_LOGITS]
            logits = self._logits(h_T1H, rows[first : first + len(part)])[: len(part)]
            best = likeliest(logits, self.num_ids, self._tp)
            losses = cross_entropy(logits, part, self.num_ids, self._tp, self.kernels)
            found.append(torch.stack((losses, (best == part).float())))
        return torch.cat(found, dim=1)

    def _logits(self, h_T1H: Tensor | None, rows: Sequence[int]) -> Tensor:
        """This rank's logits [n,V/t] of tokens `rows`, padded as GEMMs are in `packing`."""
        assert h_T1H is not None  # the last stage has the head
        padded = [*rows, *[rows[-1]] * (-len(rows) % TOKENS_PER_TILE)]
        return self.chunks[-1].logits(h_T1H[torch.tensor(padded, device=self.device)])[:, 0]

    def _on_all_stages(self, compute: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """The fp32 result of `compute` on the last stage, where it is called."""
        pipeline = self.groups.pipeline_parallel
        result = torch.zeros(0, device=self.device)
        result = compute().contiguous() if self._is_last_stage else result.new_zeros(shape)
        sent = ScaledTensor(result, torch.ones((), device=self.device), FP32)
        wire = Wire("pipeline", "fp32", WireCounter())
        return broadcast(sent, pipeline.size() - 1, pipeline, wire).wait().payload

    def _cache_format(self, dtype: str) -> Format:
        if dtype == "fp8":
            return E4M3
        return FP32 if self._dtype == torch.float32 else BF16

    @property
    def _weights(self) -> list[Param]:
        return [weight for chunk in self.chunks for weight in named_params(chunk).values()]

    @property
    def _tp(self) -> TPContext:
        return self.chunks[0].tp

    @property
    def _dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.chunks[0].dtype

    @property
    def _is_last_stage(self) -> bool:
        return self.groups.pipeline_parallel.rank() == self.groups.pipeline_parallel.size() - 1


def _wanted(
    packed: PackedTokens, sequences: Sequence[list[int]], counts: Sequence[int]
) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Tokens of `packed` after which a token is scored, that token, and where its score belongs."""
    begin = 0
    for piece, end in zip(packed.pieces, packed.ends, strict=True):
        sequence = sequences[piece.sequence]
        first = len(sequence) - counts[piece.sequence]  # the first token that is scored
        for row, number in zip(
            range(begin, end), range(piece.first + 1, piece.last + 1), strict=True
        ):
            if number >= first:
                yield row, sequence[number], (piece.sequence, number - first)
        begin = end
