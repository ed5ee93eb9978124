"""How optimizer states are rounded to their storage formats.

    master weight    stochastically or to nearest, as configured
    first moment     to nearest, but stochastically among subnormals
    second moment    to nearest

A first moment decays by a factor of 0.9. Among E4M3's subnormals, rounding to nearest takes 0.9
times 4 steps back to 4, so the moment of a weight that gets no gradient (the embedding of a rare
token) would stop decaying and push the weight for ever, while its second moment decays on.
Rounded stochastically it decays to zero, on average at the right rate.
"""

from __future__ import annotations

from torch import Tensor

from fp8lm.kernels.adam import StoredTensor
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.kernels.rounding import cast_stochastic, noise_bits
from fp8lm.layers.param import ParamSpec


class StateRounding:
    """Casts for `adam_step`: one weight, one step; `key` (0-d int32) seeds the noise.

    The noise is a function of key and element of the logical weight `spec`, whatever part of it
    lies here; it is drawn once per block for all states. `first` is the number of the first
    element stepped here among this rank's.
    """

    def __init__(
        self, kernels: ReferenceKernels, key: Tensor, spec: ParamSpec, first: int = 0
    ) -> None:
        self._first = first
        self._kernels = kernels
        self._key = key
        self._spec = spec
        self._noise: tuple[int, Tensor] | None = None

    def nearest(self, values: Tensor, stored: StoredTensor, start: int) -> Tensor:
        """Round to nearest."""
        return self._kernels.cast(values, stored.new_scale, stored.format)

    def stochastic(self, values: Tensor, stored: StoredTensor, start: int) -> Tensor:
        """Round stochastically; the block's first element is number `start` of its tensor."""
        noise = self._bits(start, values)
        return cast_stochastic(values, stored.new_scale, stored.format, noise)

    def stochastic_subnormals(self, values: Tensor, stored: StoredTensor, start: int) -> Tensor:
        """Round to nearest, and stochastically what the format holds as a subnormal."""
        if not stored.format.scaled:  # its subnormals are far below any moment
            return self.nearest(values, stored, start)
        noise = self._bits(start, values)
        return cast_stochastic(values, stored.new_scale, stored.format, noise, subnormals_only=True)

    def _bits(self, start: int, values: Tensor) -> Tensor:
        if self._noise is None or self._noise[0] != start:
            shard_spec, shape = self._spec.shard_spec, self._spec.shape
            first = self._first + start
            index = shard_spec.element_index(shape, first, values.numel(), values.device)
            self._noise = start, noise_bits(index, self._key)
        return self._noise[1]
