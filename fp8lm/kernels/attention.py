"""Causal attention on a GPU, by kernels that never form the matrix of scores.

    flash-attention 3    where it is installed (`flash_attn_interface`), on Hopper, without dropout
    cuDNN, flash         PyTorch's `scaled_dot_product_attention`, held to these two in this order

Left alone, PyTorch takes a kernel that writes S x S scores where neither of them takes the shapes:
many times slower, out of memory at long sequences, and silent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fp8lm.runtime.errors import InputError

PINNED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
_HOPPER = 9  # major compute capability
_LARGEST_HEAD = 256  # features that flash-attention 3 takes
_REFUSALS = ("No available kernel", "No viable backend")  # PyTorch's, of CUDA and of a CPU
_HALF = (torch.bfloat16, torch.float16)  # what these kernels compute in


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """PyTorch's, [B,N,S,D]; `k` and `v` may have fewer heads."""
    return functional.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
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

    fp32, which neither computes in, is left to PyTorch. InputError where none takes the shapes.
    """

    def __init__(
        self,
        flash_3: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
        backends: Sequence[SDPBackend] = PINNED,
    ) -> None:
        self._flash_3, self._backends = flash_3, list(backends)

    @property
    def description(self) -> str:
        """What computes attention, in words."""
        fused = " or ".join({"CUDNN": "cuDNN"}.get(n, n.lower()) for n in self._names())
        pinned = f"{fused} attention in BF16, through scaled_dot_product_attention"
        return pinned if self._flash_3 is None else f"flash-attention 3; with dropout {pinned}"

    def __call__(self, q_BNSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, dropout: float) -> Tensor:
        """See `Kernels.attention`."""
        if q_BNSD.dtype not in _HALF:
            return causal_attention(q_BNSD, k_BGSD, v_BGSD, dropout)
        if self._flash_3 is not None and not dropout and q_BNSD.shape[-1] <= _LARGEST_HEAD:
            heads_last = (x.transpose(1, 2) for x in (q_BNSD, k_BGSD, v_BGSD))
            result = self._flash_3(*heads_last, causal=True)
            # Some of its versions return the log of the sums beside the context.
            return (result if isinstance(result, Tensor) else result[0]).transpose(1, 2)
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

    def _names(self) -> list[str]:
        return [backend.name.removesuffix("_ATTENTION") for backend in self._backends]


def fused_attention(capability: tuple[int, int]) -> FusedAttention:
    """The best that is installed for a GPU of this compute capability."""
    if capability[0] != _HOPPER:
        return FusedAttention()
    try:
        return FusedAttention(import_module("flash_attn_interface").flash_attn_func)
    except Exception:  # what a package built for another PyTorch comes up with
        return FusedAttention()
