"""The GPT language model, from token ids to logits.

Shapes: B micro-batch, S sequence, H hidden, V padded vocabulary. Hidden states are [S,B,H], so
that a slice of the sequence is contiguous; with sequence parallelism a rank has its slice of them
between layers. With tensor parallelism it has its part of V.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fp8lm.batch import Batch, Documents
from fp8lm.config import ModelConfig
from fp8lm.layers.dropout import DropoutNoise, dropout
from fp8lm.layers.embedding import embed
from fp8lm.layers.linear import GemmPath, linear
from fp8lm.layers.param import ParamSpec, QuantizedParam
from fp8lm.layers.recipe import Recipe
from fp8lm.model.attention import CoreAttention
from fp8lm.model.decoder import Decoder, StageSpec
from fp8lm.model.init import normal_init, table_spec
from fp8lm.model.rope import rope_tables


class EmbeddingMatrix(nn.Module):
    """Holder of one embedding or output matrix, so that its name ends in `.weight`."""

    def __init__(self, spec: ParamSpec, recipe: Recipe) -> None:
        super().__init__()
        self.weight = QuantizedParam(spec, recipe.kernels, recipe.device)

    @classmethod
    def of_vocabulary(cls, vocab_size: int, config: ModelConfig, recipe: Recipe) -> EmbeddingMatrix:
        """[V,H], rows split over the ranks."""
        init, shard_spec = normal_init(config.init_method_std), recipe.tp.shard(0)
        return cls(table_spec(vocab_size, config.hidden_size, init, recipe, shard_spec), recipe)

    @classmethod
    def of_positions(cls, config: ModelConfig, recipe: Recipe) -> EmbeddingMatrix:
        """[max_position_embeddings, H], whole on every rank."""
        shape = (config.max_position_embeddings, config.hidden_size)
        init, sequence_parallel = (
            normal_init(config.init_method_std),
            recipe.tp.sequence_parallel,
        )
        return cls(table_spec(*shape, init, recipe, sequence_parallel=sequence_parallel), recipe)


class Embedding(nn.Module):
    """Token table, optional learned positions, dropout."""

    def __init__(self, config: ModelConfig, vocab_size: int, recipe: Recipe) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.tp = recipe.tp
        self.word_embeddings = EmbeddingMatrix.of_vocabulary(vocab_size, config, recipe)
        self.position_embeddings = None
        if config.position_embedding_type == "learned_absolute":
            self.position_embeddings = EmbeddingMatrix.of_positions(config, recipe)

    def forward(
        self,
        tokens_BS: Tensor,
        noise: DropoutNoise | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """[B,S] int64 -> [S,B,H]; learned positions are `positions_BS`, or 0 .. S - 1."""
        tokens_SB = tokens_BS.t().contiguous()
        h_SBH = embed(tokens_SB, self.word_embeddings.weight, self.tp.replicated_side())
        if self.position_embeddings is not None:
            first = self.tp.rank * len(h_SBH) if self.tp.sequence_parallel else 0
            here = slice(first, first + len(h_SBH))
            table = self.position_embeddings.weight
            if positions_BS is not None:
                h_SBH = h_SBH + embed(positions_BS.t()[here].contiguous(), table)
            else:
                positions = torch.arange(here.start, here.stop, device=h_SBH.device)
                h_SBH = h_SBH + embed(positions, table)[:, None]
        return dropout(h_SBH, self.dropout, noise)


class TiedEmbedding(nn.Module):
    """The word embeddings of a last stage, where they are only the tied head's matrix."""

    def __init__(self, config: ModelConfig, vocab_size: int, recipe: Recipe) -> None:
        super().__init__()
        self.word_embeddings = EmbeddingMatrix.of_vocabulary(vocab_size, config, recipe)


class GPTModel(nn.Module):
    """Token ids to logits; `config` is the config section `model`.

    `vocab_size` is the padded one; `seed` enters the masks of hidden dropout. `part` is the part
    that a pipeline stage holds (default: all); weights have the names of the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        recipe: Recipe,
        recompute_granularity: str | None = None,
        seed: int = 0,
        part: StageSpec | None = None,
    ) -> None:
        super().__init__()
        self.part = part = part or StageSpec(range(config.num_layers))
        self.seed = seed
        self.drops_hidden = config.hidden_dropout > 0
        self.tp = recipe.tp
        self.head = GemmPath(
            recipe.head_gemm, recipe.kernels, self.tp.replicated_side(), self.tp.sharded_side()
        )
        tied = not config.untie_embeddings_and_output_weights
        self.embedding: Embedding | TiedEmbedding | None = None
        if part.has_embedding:
            self.embedding = Embedding(config, vocab_size, recipe)
        elif part.has_head and tied:
            self.embedding = TiedEmbedding(config, vocab_size, recipe)
        self.decoder = Decoder(config, recipe, recompute_granularity, part)
        self.output_layer = None
        if part.has_head and not tied:
            self.output_layer = EmbeddingMatrix.of_vocabulary(vocab_size, config, recipe)
        self.kernels = recipe.kernels
        self.dtype = recipe.high_precision.dtype  # of the hidden states
        self.rope = None
        if config.position_embedding_type == "rope":
            self.rope = rope_tables(
                config.max_position_embeddings,
                config.kv_channels,
                config.rotary_base,
                config.rotary_percent,
                recipe.device,
                config.rope_scaling_factor if config.use_rope_scaling else None,
            )

    def forward(
        self,
        tokens_BS: Tensor,
        h_SBH: Tensor | None = None,
        *,
        positions_BS: Tensor | None = None,
        sample_ids_B: Tensor | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """[B,S] int64 -> logits [S,B,V/t] in the dtype of activations.

        A part without head returns hidden states. See `hidden_states` for what is given.
        """
        h_SBH = self.hidden_states(
            tokens_BS,
            h_SBH,
            positions_BS=positions_BS,
            sample_ids_B=sample_ids_B,
            documents=documents,
        )
        return self.logits(h_SBH) if self.part.has_head else h_SBH

    def hidden_states(
        self,
        tokens_BS: Tensor,
        h_SBH: Tensor | None = None,
        *,
        positions_BS: Tensor | None = None,
        sample_ids_B: Tensor | None = None,
        documents: Documents | None = None,
        core_of: Callable[[int], CoreAttention] | None = None,
    ) -> Tensor:
        """[B,S] int64 -> [S,B,H] after this part's layers, and after the final norm of the last.

        A part without embedding starts from the hidden states `h_SBH`. Hidden dropout needs
        `sample_ids_B`; for these, `positions_BS` and `documents` see `Batch`, for `core_of`
        `Decoder`.
        """
        noise = self._noise(sample_ids_B, tokens_BS.shape[1])
        if isinstance(self.embedding, Embedding):
            h_SBH = self.embedding(tokens_BS, noise and noise.at(0), positions_BS)
        rope = self._rope(tokens_BS.shape[1], positions_BS)
        mask = None if documents is None else self.kernels.document_mask(documents, self.dtype)
        return self.decoder(h_SBH, rope, noise and noise.at(1), core_of, mask)

    def logits(self, h_SBH: Tensor) -> Tensor:
        """Logits [S,B,V/t] of the last part's hidden states."""
        table = self.output_layer
        if table is None:
            assert self.embedding is not None  # a head has its own matrix or the tied one
            table = self.embedding.word_embeddings
        return linear(h_SBH, table.weight, self.head)

    def forward_step(self, h_SBH: Tensor | None, batch: Batch) -> Tensor:
        """Logits of a micro-batch, or hidden states where this part lacks the head."""
        return self(
            batch.tokens,
            h_SBH,
            positions_BS=batch.position_ids,
            sample_ids_B=batch.sample_ids,
            documents=batch.documents,
        )

    def _noise(self, sample_ids_B: Tensor | None, seq_length: int) -> DropoutNoise | None:
        if not (self.training and self.drops_hidden):
            return None
        if sample_ids_B is None:
            raise ValueError("hidden dropout needs the numbers of the micro-batch's samples")
        first = 0
        if self.tp.sequence_parallel:
            first = self.tp.rank * seq_length // self.tp.size
        return DropoutNoise.of_samples(sample_ids_B, self.seed, first)

    def _rope(self, seq_length: int, positions_BS: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin [S,1,1,R], or with positions of every sample [S,B,1,R]."""
        if self.rope is None:
            return None
        if positions_BS is None:
            cos, sin = (table[:seq_length] for table in self.rope)
        else:
            cos, sin = (table[positions_BS.t()].squeeze(2) for table in self.rope)
        return cos.to(self.dtype), sin.to(self.dtype)
