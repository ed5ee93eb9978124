"""Causal attention on a GPU, by kernels that never form the matrix of scores.

    flash-attention 3    where it is installed (`flash_attn_interface`), on Hopper, without dropout
    cuDNN, flash         PyTorch's `scaled_dot_product_attention`, held to these two in this order

Left alone, PyTorch takes a kernel that writes S x S scores where neither of them takes the shapes:
many times slower, out of memory at long sequences, and silent.

Documents that do not see each other are computed as sequences of their own, by flash-attention 3 or
PyTorch's `varlen_attn`, which is flash attention: work and memory are those of the documents. In
fp32, which neither computes in, and on a CPU a block-diagonal causal mask is added to the scores.

Shapes: B samples of S tokens, T = B S tokens of all; N heads, D features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fp8lm.batch import Documents
from fp8lm.runtime.errors import InputError

PINNED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
_HOPPER = 9  # major compute capability
_LARGEST_HEAD = 256  # features that flash attention takes, of PyTorch and 3
_HEAD_MULTIPLE = 8  # features that its kernels for documents take at a time
_REFUSALS = ("No available kernel", "No viable backend")  # PyTorch's, of CUDA and of a CPU
_HALF = (torch.bfloat16, torch.float16)  # what these kernels compute in
# q, k, v [T,N,D], cu_seqlens [documents + 1] int32, max_seqlen -> [T,N,D], causal in each document.
VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class DocumentMask:
    """Documents as a backend's attention reads them.

    `scores` [B,1,S,S] fp32 is what is added to scores where no kernel of variable length computes:
    0 where a token sees another, -inf elsewhere.
    """

    documents: Documents
    scores: Tensor | None = None

    @classmethod
    def additive(cls, documents: Documents) -> DocumentMask:
        """With `scores`. fp32: PyTorch would turn a mask of booleans into that in every layer."""
        starts = documents.starts
        places = torch.arange(starts.shape[1], device=starts.device)
        seen = (places >= starts[:, :, None]) & (places <= places[:, None])
        scores = torch.zeros(seen.shape, device=starts.device).masked_fill_(~seen, -math.inf)
        return cls(documents, scores[:, None])


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's, [B,N,S,D]; `k` and `v` may have fewer heads."""
    return functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def masked_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: DocumentMask) -> Tensor:
    """PyTorch's, [B,N,S,D] in fp32, with the `scores` of `mask`."""
    return functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.scores,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def attention_at_positions(q: Tensor, k: Tensor, v: Tensor, positions_BS: Tensor) -> Tensor:
    """`Kernels.attention_at` by PyTorch's fused kernels, in the dtype of `q`."""
    keys = torch.arange(k.shape[2], device=positions_BS.device)
    seen = keys <= positions_BS[:, None, :, None]
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
    )


class FusedAttention:
    """`Kernels.attention` by `flash_3` (of flash-attention 3) where it can, else by `backends`.

    Documents are kept apart by `varlen`, named `varlen_name`. fp32, which none of these computes
    in, is left to PyTorch. InputError where none takes the shapes, or dropout.
    """

    def __init__(
        self,
        flash_3: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
        backends: Sequence[SDPBackend] = PINNED,
        varlen: VarlenAttention | None = None,
        varlen_name: str = "flash attention (varlen_attn)",
    ) -> None:
        self._flash_3, self._backends = flash_3, list(backends)
        self._varlen, self._varlen_name = varlen or pytorch_varlen_attention, varlen_name

    @property
    def description(self) -> str:
        """What computes attention, in words."""
        fused = " or ".join({"CUDNN": "cuDNN"}.get(n, n.lower()) for n in self._names())
        pinned = f"{fused} attention in BF16, through scaled_dot_product_attention"
        if self._flash_3 is not None:
            pinned = f"flash-attention 3; with dropout {pinned}"
        return f"{pinned}; documents apart: {self._varlen_name}"

    def document_mask(self, documents: Documents, dtype: torch.dtype) -> DocumentMask:
        """See `Kernels.document_mask`."""
        return DocumentMask(documents) if dtype in _HALF else DocumentMask.additive(documents)

    def __call__(
        self,
        q_BNSD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        dropout: float,
        mask: DocumentMask | None = None,
    ) -> Tensor:
        """See `Kernels.attention`."""
        if mask is not None:
            if q_BNSD.dtype not in _HALF:
                return masked_attention(q_BNSD, k_BGSD, v_BGSD, dropout, mask)
            return self._within_documents(q_BNSD, k_BGSD, v_BGSD, dropout, mask.documents)
        if q_BNSD.dtype not in _HALF:
            return causal_attention(q_BNSD, k_BGSD, v_BGSD, dropout)
        if self._flash_3 is not None and not dropout and q_BNSD.shape[-1] <= _LARGEST_HEAD:
            heads_last = (x.transpose(1, 2) for x in (q_BNSD, k_BGSD, v_BGSD))
            return _context_of(self._flash_3(*heads_last, causal=True)).transpose(1, 2)
        try:
            with sdpa_kernel(self._backends, set_priority=True):
                return causal_attention(q_BNSD, k_BGSD, v_BGSD, dropout)
        except RuntimeError as error:
            if not any(refusal in str(error) for refusal in _REFUSALS):
                raise
            raise InputError(
                f"no attention of {' or '.join(self._names())} takes {q_BNSD.shape[1]} query and "
                f"{k_BGSD.shape[1]} key heads of {q_BNSD.shape[-1]} features in {q_BNSD.dtype}: "
                "change model.kv_channels or model.num_attention_heads, or update PyTorch"
            ) from error

    def _within_documents(
        self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, dropout: float, documents: Documents
    ) -> Tensor:
        size = q_BNSD.shape[-1]
        if size > _LARGEST_HEAD or size % _HEAD_MULTIPLE or dropout:
            raise InputError(
                f"{self._varlen_name} keeps documents apart (data.reset_attention_mask) without "
                f"dropout and with at most {_LARGEST_HEAD} features of a head, a multiple of "
                f"{_HEAD_MULTIPLE}: change model.kv_channels = {size}, or model.attention_dropout "
                f"= {dropout:g}"
            )
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BNSD, k_BGSD, v_BGSD))
        context = self._varlen(q, k, v, documents.cu_seqlens, documents.max_seqlen)
        return context.unflatten(0, (len(q_BNSD), -1)).transpose(1, 2)

    def _names(self) -> list[str]:
        return [backend.name.removesuffix("_ATTENTION") for backend in self._backends]


def fused_attention(capability: tuple[int, int]) -> FusedAttention:
    """The best that is installed for a GPU of this compute capability."""
    if capability[0] != _HOPPER:
        return FusedAttention()
    try:
        flash_3 = import_module("flash_attn_interface")
        of_documents = _flash_3_varlen(flash_3.flash_attn_varlen_func)
        return FusedAttention(
            flash_3.flash_attn_func, varlen=of_documents, varlen_name="flash-attention 3"
        )
    except Exception:  # what a package built for another PyTorch comes up with
        return FusedAttention()


def pytorch_varlen_attention(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """`VarlenAttention` by PyTorch's flash attention, which takes fewer heads in `k` and `v`."""
    from torch.nn.attention.varlen import varlen_attn  # registers operators of a GPU

    causal: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in signature(varlen_attn).parameters:  # older ones take them untold
        causal["enable_gqa"] = q_TND.shape[1] != k_TGD.shape[1]
    bounds = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _context_of(varlen_attn(q_TND, k_TGD, v_TGD, *bounds, **causal))


def _flash_3_varlen(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> VarlenAttention:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        bounds = {
            "cu_seqlens_q": cu_seqlens,
            "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "max_seqlen_k": max_seqlen,
        }
        return _context_of(function(q, k, v, **bounds, causal=True))

    return attend


def _context_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some kernels return the log of the sums beside the context, and some versions of others."""
    return result if isinstance(result, Tensor) else result[0]
