"""Cross-entropy of the part of the vocabulary that a rank holds, in eager PyTorch.

Shapes: T tokens, V rows of the vocabulary on this rank, of which the first `used` are no padding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Saved = tuple[Tensor, ...]
Gather = Callable[[Tensor], Tensor]

_EVERY_TOKEN, _IGNORED = 0, -100  # arguments of PyTorch's loss: no reduction, no such label


def cross_entropy(
    logits_TV: Tensor, columns_T: Tensor, used: int, gather: Gather | None
) -> tuple[Tensor, Saved]:
    """See `Kernels`."""
    if gather is None:
        log_probs = functional.log_softmax(logits_TV[:, :used].float(), dim=1)
        losses, weight = torch.ops.aten.nll_loss_forward(
            log_probs, columns_T, None, _EVERY_TOKEN, _IGNORED
        )
        # Of the logits only dtype and shape are needed: an empty tensor has both.
        return losses, (log_probs, columns_T, weight, logits_TV[:0])
    logits = logits_TV.float()
    columns, elsewhere = _own_columns(columns_T, logits)
    own_lse = torch.logsumexp(logits[:, :used], dim=1)  # -inf where `used` is 0
    own_target = logits.gather(1, columns[:, None])[:, 0].masked_fill(elsewhere, 0.0)
    lse, target = gather(torch.stack((own_lse, own_target))).unbind(dim=1)
    lse_T = torch.logsumexp(lse, dim=0)
    return lse_T - target.sum(dim=0), (logits_TV, columns_T, lse_T)


def cross_entropy_backward(saved: Saved, dy_T: Tensor, used: int) -> Tensor:
    """See `Kernels`."""
    if len(saved) == 4:
        return _whole_gradient(*saved, dy_T)
    logits_TV, columns_T, lse_T = saved
    gradient = torch.exp(logits_TV.float() - lse_T[:, None])
    gradient[:, used:] = 0.0
    columns, elsewhere = _own_columns(columns_T, gradient)
    onehot = (~elsewhere).to(gradient.dtype)
    gradient.scatter_add_(1, columns[:, None], -onehot[:, None])
    return gradient.mul_(dy_T[:, None]).to(logits_TV.dtype)


def _whole_gradient(
    log_probs: Tensor, labels_T: Tensor, weight: Tensor, like: Tensor, dy_T: Tensor
) -> Tensor:
    """As autograd has it of `functional.cross_entropy`."""
    aten = torch.ops.aten
    gradient = aten.nll_loss_backward(
        dy_T, log_probs, labels_T, None, _EVERY_TOKEN, _IGNORED, weight
    )
    from_log_softmax = aten._log_softmax_backward_data  # noqa: SLF001 (torch has no public one)
    gradient = from_log_softmax(gradient, log_probs, 1, torch.float32)
    gradient, used = gradient.to(like.dtype), log_probs.shape[1]
    if used == like.shape[1]:
        return gradient
    return aten.slice_backward(gradient, (len(gradient), like.shape[1]), 1, 0, used, 1)


def _own_columns(columns_T: Tensor, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as columns, and a mask of those that another rank has."""
    elsewhere = (columns_T < 0) | (columns_T >= logits_TV.shape[1])
    return columns_T.masked_fill(elsewhere, 0), elsewhere
