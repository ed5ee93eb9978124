"""AdamW's states of a weight, their formats (FP8-LM, section 2.2) and their rounding.

    master weight    stochastically or to nearest, as configured
    first moment     to nearest, but stochastically among subnormals
    second moment    to nearest; as its root in eight bits stochastically

A first moment decays by a factor of 0.9. Among E4M3's subnormals, rounding to nearest takes 0.9
times 4 steps back to 4, so the moment of a weight that gets no gradient (the embedding of a rare
token) would stop decaying and push the weight for ever, while its second moment decays on.
Rounded stochastically it decays to zero, on average at the right rate. A second moment that moves
by less than a step of its format, 5 % of a step or 0.1 %, needs the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8lm.config import PrecisionConfig
from fp8lm.kernels.rounding import Rounding
from fp8lm.numerics import FP16, Format, format_by_name
from fp8lm.scaled_tensor import ScaledTensor


@dataclass(frozen=True)
class StatePrecision:
    """Formats of the optimizer's states; `master` None: the weight itself is the master."""

    master: Format | None
    exp_avg: Format
    exp_avg_sq: Format
    stochastic_master: bool

    @classmethod
    def from_config(cls, precision: PrecisionConfig) -> StatePrecision:
        """The formats of config section `precision`."""
        master = precision.main_params_dtype
        return cls(
            master=None if master == "none" else format_by_name(master),
            exp_avg=format_by_name(precision.exp_avg_dtype),
            exp_avg_sq=format_by_name(precision.exp_avg_sq_dtype),
            stochastic_master=precision.master_rounding == "stochastic",
        )

    @property
    def rounding(self) -> tuple[Rounding, Rounding, Rounding]:
        """How master, m and v are rounded to their formats; see the module."""
        master = Rounding.STOCHASTIC if self.stochastic_master else Rounding.NEAREST
        exp_avg_sq = Rounding.STOCHASTIC if self.exp_avg_sq.root else Rounding.NEAREST
        return master, Rounding.STOCHASTIC_SUBNORMALS, exp_avg_sq

    def own_master(self, stored: Format) -> Format | None:
        """Format of the master weight of a weight stored in `stored`; None: it is its own master.

        A dense weight that is not stored with enough bits to be that gets one in FP16.
        """
        if self.master is not None:
            return self.master
        return None if stored.scaled else FP16


@dataclass
class AdamState:
    """States of one weight; `owns_master` False: `master` is the model parameter itself."""

    master: ScaledTensor
    exp_avg: ScaledTensor
    exp_avg_sq: ScaledTensor
    owns_master: bool

    @property
    def stored(self) -> tuple[ScaledTensor, ScaledTensor, ScaledTensor]:
        """Master, m and v."""
        return self.master, self.exp_avg, self.exp_avg_sq
