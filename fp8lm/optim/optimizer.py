"""AdamW whose master weight and moments are each stored in a format of their own.

(FP8-LM, arXiv 2310.18313, section 2.2.) The default for FP8 matrices is 2 bytes of master weight
(FP16 and a scale), 1 byte of first moment (E4M3), 2 bytes of second moment (FP16 and a scale).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fp8lm.config import OptimizerConfig
from fp8lm.kernels.adam import AdamCoefficients, Cast, StoredTensor, adam_step
from fp8lm.kernels.reference import ReferenceKernels
from fp8lm.layers.param import Param
from fp8lm.numerics import Format, scale_from_amax
from fp8lm.optim.bounds import bound_amax
from fp8lm.optim.clipping import GradientNorm, gradient_norm
from fp8lm.optim.rounding import StateRounding
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.optim.states import AdamState, StatePrecision
from fp8lm.scaled_tensor import ScaledTensor, quantize


class AdamW:
    """Updates all `weights` (by name); see `AdamCoefficients` for the arithmetic.

    `config` is the config section `optimizer`; `seed` enters the noise of stochastic rounding.
    `sharding` says which rows of which weights have their states on this rank (default: all), and
    how the ranks share scalars. Norm, skip decision and scales are those of the logical tensors, so
    the bytes of a state do not depend on the layout. A rank updates its rows and sets the new
    scales of all weights; the payloads of other rows come from the ranks that update them.
    """

    def __init__(
        self,
        weights: dict[str, Param],
        config: OptimizerConfig,
        precision: StatePrecision,
        kernels: ReferenceKernels,
        *,
        seed: int,
        sharding: OptimizerSharding | None = None,
    ) -> None:
        self.weights = weights
        self.sharding = sharding or OptimizerSharding.build(weights)
        self.config = config
        self.precision = precision
        self.kernels = kernels
        self.seed = seed
        self.states: dict[str, AdamState] = {}
        device = next(iter(weights.values())).model_param.device
        self.num_steps = torch.zeros((), dtype=torch.int64, device=device)
        # Row i: the true amax of master, m and v of the i-th weight.
        self.amax = torch.zeros(len(weights), 3, device=device)
        decays = [config.weight_decay * weight.spec.decay for weight in weights.values()]
        self._decay = torch.tensor(decays, device=device)

    def initialize(self, name: str, value: Tensor) -> None:
        """Set weight `name` to its part of the whole fp32 `value` and start its states."""
        weight, p = self.weights[name], self.precision
        compute = weight.model_param
        value = value.to(compute.device)
        amax = self.kernels.amax(value)  # of the whole, so that every part has its scale
        value = weight.spec.shard_spec.take(value)
        compute.copy_(quantize(value, compute.format, self.kernels, amax=amax))
        self.amax[list(self.weights).index(name), 0] = amax
        if name not in self.sharding.local_shards:
            return
        start, stop = self.sharding.local_shards[name]
        value, compute = value[start:stop], compute.rows(start, stop)
        fmt, master = p.own_master(compute.format), compute
        if fmt is not None:
            master = quantize(value.clone(), fmt, self.kernels, amax=amax)
        self.states[name] = AdamState(
            master=master,
            exp_avg=ScaledTensor.zeros(value.shape, p.exp_avg, compute.device),
            exp_avg_sq=ScaledTensor.zeros(value.shape, p.exp_avg_sq, compute.device),
            owns_master=fmt is not None,
        )

    def step(
        self,
        lr: float,
        gradients: dict[str, ScaledTensor] | None = None,
        *,
        share: Tensor | None = None,
        loss: Tensor | None = None,
        stop: Tensor | None = None,
    ) -> GradientNorm:
        """One update from the `gradients` of this rank's rows; returns norm and skip flag.

        Default: what the weights have accumulated. A skipped step changes no byte of weights,
        states, scales or step count. `share`, `loss` and `stop` (0-d fp32) are this rank's
        `StepScalars`, which are exchanged with the norm.
        """
        if gradients is None:
            gradients = {
                name: self.weights[name].main_grad.value.rows(*rows)
                for name, rows in self.sharding.local_shards.items()
            }
        norm = self._norm(gradients, self.config.clip_grad, share=share, loss=loss, stop=stop)
        grad_amax, amax = self._largest(norm.amax)
        norm = replace(norm, amax=grad_amax)
        on_host = norm.skip.device.type == "cpu"
        if on_host and norm.skip:
            return norm
        skip = None if on_host else norm.skip
        self.num_steps += (~norm.skip).long()
        self._update(self._coefficients(lr, norm, skip), amax, norm.amax, gradients)
        return norm

    def _update(
        self,
        c: AdamCoefficients,
        amax: Tensor,
        grad_amax: Tensor,
        gradients: dict[str, ScaledTensor],
    ) -> None:
        bounds = bound_amax(amax, grad_amax, self._decay, c, self._formats)
        scales = self._next_scales(bounds)
        new_amax = torch.stack(
            [
                self._step_weight(
                    name,
                    {kind: scale[i] for kind, scale in scales.items()},
                    own,
                    gradients.get(name),
                )
                for i, (name, own) in enumerate(self._per_weight(c))
            ]
        )
        _replace(self.amax, self._saturated(new_amax, scales), c.skip)

    def share_amax(self) -> None:
        """Make `amax` that of the logical tensors; a collective of all ranks.

        Between steps it covers the rows that this rank updates: `step` shares it.
        """
        self.amax.copy_(self.sharding.max(self.amax.flatten()).view_as(self.amax))

    def params_norm(self) -> Tensor:
        """Euclidean norm of all master weights (0-d fp32)."""
        return self._norm({name: state.master for name, state in self.states.items()}, 0.0).norm

    def _norm(
        self, tensors: dict[str, ScaledTensor], clip: float, **scalars: Tensor | None
    ) -> GradientNorm:
        return gradient_norm(
            [tensors.get(name) for name in self.weights],
            clip,
            self.kernels,
            device=self.amax.device,
            gather=self.sharding.gather,
            norm_owner=[self.sharding.norm_owner[name] for name in self.weights],
            **scalars,
        )

    def _largest(self, grad_amax: Tensor) -> tuple[Tensor, Tensor]:
        """Amaxes [W] of the logical gradients and [W, 3] of the logical states, in one exchange."""
        local = torch.cat((grad_amax, self.amax.flatten()))
        grad, states = self.sharding.max(local).split((len(grad_amax), self.amax.numel()))
        return grad, states.view_as(self.amax)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the states, by name, for a checkpoint; without model parameters."""
        yield "num_steps", self.num_steps
        for name, state in self.states.items():
            stored = {"exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
            if state.owns_master:
                stored["master"] = state.master
            for kind, tensor in stored.items():
                yield f"{kind}.{name}.payload", tensor.payload
                yield f"{kind}.{name}.scale", tensor.scale
        for name, amax in zip(self.weights, self.amax.unbind(), strict=True):
            yield f"amax.{name}", amax

    @property
    def _formats(self) -> tuple[Format, Format, Format]:
        p, weight = self.precision, next(iter(self.weights.values()))
        return self._master_format(weight), p.exp_avg, p.exp_avg_sq

    def _master_format(self, weight: Param) -> Format:
        return self.precision.own_master(weight.spec.format) or weight.spec.format

    def _coefficients(self, lr: float, norm: GradientNorm, skip: Tensor | None) -> AdamCoefficients:
        config = self.config
        # A skipped very first step would divide by zero; its result is not kept anyway.
        steps = self.num_steps.clamp(min=1).double()
        return AdamCoefficients(
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_eps,
            lr=lr,
            weight_decay=config.weight_decay,
            clip_factor=norm.clip_factor,
            bias_correction1=(1.0 - config.adam_beta1**steps).float(),
            bias_correction2=(1.0 - config.adam_beta2**steps).float(),
            skip=skip,
        )

    def _per_weight(self, c: AdamCoefficients) -> Iterator[tuple[str, AdamCoefficients]]:
        no_decay = replace(c, weight_decay=0.0)
        for name, weight in self.weights.items():
            yield name, c if weight.spec.decay else no_decay

    def _next_scales(self, bounds: Tensor) -> dict[str | Format, Tensor]:
        """Scales [W] of the new master, m and v, and of model parameters by their format."""
        w, m, v = bounds.unbind(dim=1)
        master, exp_avg, exp_avg_sq = self._formats
        scales: dict[str | Format, Tensor] = {
            fmt: scale_from_amax(w, fmt)
            for fmt in {weight.spec.format for weight in self.weights.values()}
        }
        scales["master"] = scale_from_amax(w, master)
        scales["exp_avg"] = scale_from_amax(m, exp_avg)
        scales["exp_avg_sq"] = scale_from_amax(v, exp_avg_sq)
        return scales

    def _saturated(self, amax: Tensor, scales: dict[str | Format, Tensor]) -> Tensor:
        """`amax` [W,3] of what was stored: beyond what its scale leaves room for it saturated."""
        kinds = zip(("master", "exp_avg", "exp_avg_sq"), self._formats, strict=True)
        limits = [fmt.max / scales[kind] for kind, fmt in kinds]
        return torch.minimum(amax, torch.stack(limits, dim=1))

    def _step_weight(
        self,
        name: str,
        scales: dict[str | Format, Tensor],
        c: AdamCoefficients,
        gradient: ScaledTensor | None,
    ) -> Tensor:
        weight = self.weights[name]
        if gradient is None:
            if weight.spec.format.scaled:
                _replace(weight.model_param.scale, scales[weight.spec.format], c.skip)
            return torch.zeros(3, device=self.amax.device)
        state = self.states[name]

        def stored(kind: str, tensor: ScaledTensor) -> StoredTensor:
            return StoredTensor(tensor.payload, tensor.scale, scales[kind], tensor.format)

        states = (
            stored("master", state.master),
            stored("exp_avg", state.exp_avg),
            stored("exp_avg_sq", state.exp_avg_sq),
        )
        compute = None
        if state.owns_master:
            copy = weight.model_param.rows(*self.sharding.local_shards[name])
            compute = StoredTensor(copy.payload, copy.scale, scales[copy.format], copy.format)
        amax = adam_step(self.kernels, gradient.operand, states, compute, c, self._casts(name))
        for tensor in states if compute is None else (*states, compute):
            if tensor.format.scaled:
                _replace(tensor.scale, tensor.new_scale, c.skip)
        return amax

    def _casts(self, name: str) -> tuple[Cast, Cast, Cast]:
        """How the states of weight `name` are rounded in this step (see `StateRounding`)."""
        base = zlib.crc32(f"{self.seed}/{name}".encode()) - (1 << 31)
        key = (self.num_steps * 0x632BE5AB + base).to(torch.int32)
        spec = self.weights[name].spec
        first = self.sharding.local_shards[name][0] * (spec.numel // spec.local_shape[0])
        rounding = StateRounding(self.kernels, key, spec, first)
        master = rounding.stochastic if self.precision.stochastic_master else rounding.nearest
        return master, rounding.stochastic_subnormals, rounding.nearest


def _replace(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    target.copy_(value if skip is None else torch.where(skip, target, value))
