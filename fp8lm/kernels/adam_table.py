"""Arguments of one AdamW step over many tensors: scalars, a table of scales, and the tensors.

Everything that differs between tensors is a row of a table or a field of `AdamParam`, and nothing
is a function: one kernel can then step all tensors at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fp8lm.kernels.rounding import ElementIndex, Rounding
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True)
class AdamCoefficients:
    """Scalars of one step; tensors are 0-d on the device, so that none needs a host sync."""

    beta1: float
    beta2: float
    eps: float
    lr: float
    clip_factor: Tensor  # multiplies the gradient
    bias_correction1: Tensor  # 1 - beta1^step
    bias_correction2: Tensor  # 1 - beta2^step
    largest_update: Tensor | None  # beyond which an update is cut off; None: it is not
    skip: Tensor | None  # bool: leave every byte unchanged; None: do not skip


@dataclass(frozen=True)
class AdamTable:
    """For all W weights: `scales` (fp32 [W,4]) and `noise_keys` (int32 [W]), on the device.

    `scales` are the new ones of model parameter, master weight, first and second moment;
    `rounding` is that of the last three. A model parameter is rounded to nearest.
    """

    scales: Tensor
    noise_keys: Tensor
    rounding: tuple[Rounding, Rounding, Rounding]


@dataclass(frozen=True)
class AdamParam:
    """Tensors of one weight, equal in shape; they keep the scales they were written with.

    `row` is its row in the table; `model_param` None: the master weight is what GEMMs read.
    `index` numbers its elements in the logical weight, for the noise.
    """

    row: int
    gradient: ScaledTensor
    model_param: ScaledTensor | None
    master: ScaledTensor
    exp_avg: ScaledTensor
    exp_avg_sq: ScaledTensor
    weight_decay: float
    index: ElementIndex

    @property
    def states(self) -> tuple[ScaledTensor, ScaledTensor, ScaledTensor]:
        """Master weight, first and second moment."""
        return self.master, self.exp_avg, self.exp_avg_sq
