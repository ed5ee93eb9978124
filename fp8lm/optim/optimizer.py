"""AdamW whose master weight and moments are each stored in a format of their own.

(FP8-LM, arXiv 2310.18313, section 2.2.) The default for FP8 matrices is 2 bytes of master weight
(FP16 and a scale), 1 byte of first moment (E4M3), 2 bytes of second moment (FP16 and a scale).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fp8lm.config import OptimizerConfig
from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.param import Param
from fp8lm.numerics import Format, largest_value, scale_from_amax
from fp8lm.optim.bounds import bound_amax, update_bound
from fp8lm.optim.clipping import GradientNorm, gradient_norm
from fp8lm.optim.sharding import OptimizerSharding
from fp8lm.optim.states import AdamState, StatePrecision
from fp8lm.scaled_tensor import ScaledTensor

_STEP_KEY = 0x632BE5AB  # noise differs from step to step
StepObserver = Callable[[Sequence[AdamParam], AdamTable, AdamCoefficients], None]


class AdamW:
    """Updates all `weights` (by name); see `fp8lm.kernels.adam` for the arithmetic.

    `config` is the config section `optimizer`; `seed` enters the noise of stochastic rounding.
    `sharding` says which rows of which weights have their states on this rank (default: all), and
    how the ranks share scalars. Norm, skip decision and scales are those of the logical tensors, so
    the bytes of a state do not depend on the layout. A rank updates its rows and sets the new
    scales of all weights; the payloads of other rows come from the ranks that update them.
    `observer` is called before every update with the arguments of `Kernels.adam`: it must change
    nothing, and not wait for the device.
    """

    def __init__(
        self,
        weights: dict[str, Param],
        config: OptimizerConfig,
        precision: StatePrecision,
        kernels: Kernels,
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
        self.observer: StepObserver | None = None
        self.states: dict[str, AdamState] = {}
        device = next(iter(weights.values())).model_param.device
        # On a GPU the host does not know whether a step is skipped: every write is masked instead.
        self.masks_writes = device.type != "cpu"
        self.num_steps = torch.zeros((), dtype=torch.int64, device=device)
        # Row i belongs to the i-th weight: the true amaxes of master, m and v, and the scales of
        # model parameter, master, m and v. Weights and states hold views of the scales.
        self.amax = torch.zeros(len(weights), 3, device=device)
        self.scales = torch.ones(len(weights), 4, device=device)
        for weight, scales in zip(weights.values(), self.scales, strict=True):
            weight.bind_scale(scales[0])
        self._rows = {name: row for row, name in enumerate(weights)}
        decays = [config.weight_decay * weight.spec.decay for weight in weights.values()]
        self._decay = torch.tensor(decays, device=device)
        # Copied to the device here, so that a step copies nothing.
        self._owned = [name for name in weights if name in self.sharding.local_shards]
        owned_rows = [self._rows[name] for name in self._owned]
        self._owned_rows = torch.tensor(owned_rows, dtype=torch.int64, device=device)
        counts = [self.sharding.norm_owner[name] for name in self._owned]
        self._norm_owner = torch.tensor(counts, dtype=torch.bool, device=device)
        names = [zlib.crc32(f"{seed}/{name}".encode()) - (1 << 31) for name in weights]
        self._name_keys = torch.tensor(names, device=device)
        formats = [weight.spec.format for weight in weights.values()]
        self._in_format = {
            fmt: torch.tensor([own == fmt for own in formats], device=device)
            for fmt in dict.fromkeys(formats)
            if fmt.scaled
        }

    def initialize(self, name: str, value: Tensor) -> None:
        """Set weight `name` to its shard of the whole fp32 `value` and create its states."""
        weight, p = self.weights[name], self.precision
        compute, amax = weight.model_param, weight.set_value(value)
        value = weight.spec.shard_spec.take(value.to(compute.device))
        self.amax[self._rows[name], 0] = amax
        if name not in self.sharding.local_shards:
            return
        start, stop = self.sharding.local_shards[name]
        value, compute = value[start:stop], compute.rows(start, stop)
        fmt, scales = p.own_master(compute.format), self.scales[self._rows[name]]
        master = compute
        if fmt is not None:
            quantized = self.kernels.quantize(value.clone(), fmt, amax=amax)
            master = ScaledTensor(quantized.payload, scales[1].copy_(quantized.scale), fmt)
        self.states[name] = AdamState(
            master=master,
            exp_avg=_zeros(value.shape, p.exp_avg, scales[2]),
            exp_avg_sq=_zeros(value.shape, p.exp_avg_sq, scales[3]),
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
        metrics: Sequence[Tensor] = (),
    ) -> GradientNorm:
        """One update from the `gradients` of this rank's rows; returns norm and skip flag.

        Default: what the weights have accumulated. A skipped step changes no byte of weights,
        states, scales or step count. `share`, `loss`, `stop` and `metrics` (0-d fp32) are this
        rank's `StepScalars`, which are exchanged with the norm.
        """
        if gradients is None:
            gradients = {
                name: self.weights[name].main_grad.value.rows(*rows)
                for name, rows in self.sharding.local_shards.items()
            }
        clip, scalars = self.config.clip_grad, {"share": share, "loss": loss, "stop": stop}
        norm = self._norm(gradients, clip, metrics, **scalars)
        grad_amax, amax = self._largest(norm.amax)
        norm = replace(norm, amax=grad_amax)
        if not self.masks_writes and norm.skip:
            return norm
        skip = norm.skip if self.masks_writes else None
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
        bounds = bound_amax(amax, grad_amax, self._decay, c, self._state_formats)
        table = AdamTable(self._next_scales(bounds), self._noise_keys(), self.precision.rounding)
        params = [self._adam_param(name, gradients[name]) for name in self._owned]
        if self.observer is not None:
            self.observer(params, table, c)
        new_amax = torch.zeros_like(self.amax)
        new_amax.index_copy_(0, self._owned_rows, self.kernels.adam(params, table, c))
        # A value beyond the range of its scale has saturated.
        new_amax = torch.minimum(new_amax, self._largest_states(table.scales))
        _replace(self.scales, table.scales, c.skip)
        _replace(self.amax, new_amax, c.skip)

    def share_amax(self) -> None:
        """Make `amax` that of the logical tensors; a collective of all ranks.

        Between steps it covers the rows that this rank updates: `step` shares it.
        """
        self.amax.copy_(self.sharding.max(self.amax))

    def params_norm(self) -> Tensor:
        """Euclidean norm of all master weights (0-d fp32)."""
        return self._norm({name: state.master for name, state in self.states.items()}, 0.0).norm

    def _norm(
        self,
        tensors: dict[str, ScaledTensor],
        clip: float,
        metrics: Sequence[Tensor] = (),
        **scalars: Tensor | None,
    ) -> GradientNorm:
        return gradient_norm(
            [tensors[name] for name in self._owned],
            clip,
            self.kernels,
            device=self.amax.device,
            gather=self.sharding.gather,
            norm_owner=self._norm_owner,
            metrics=metrics,
            **scalars,
        )

    def _largest(self, grad_amax: Tensor) -> tuple[Tensor, Tensor]:
        """Amaxes [W] of the logical gradients and [W, 3] of the logical states, in one exchange.

        `grad_amax` is of the gradients of this rank's rows.
        """
        every = torch.zeros_like(self.amax[:, 0]).index_copy_(0, self._owned_rows, grad_amax)
        largest = self.sharding.max(torch.cat((every[:, None], self.amax), dim=1))
        return largest[:, 0], largest[:, 1:]

    @property
    def _state_formats(self) -> tuple[Format, Format, Format]:
        p, weight = self.precision, next(iter(self.weights.values()))
        master = p.own_master(weight.spec.format) or weight.spec.format
        return master, p.exp_avg, p.exp_avg_sq

    def _coefficients(self, lr: float, norm: GradientNorm, skip: Tensor | None) -> AdamCoefficients:
        config = self.config
        # A skipped very first step would divide by zero; its result is not kept anyway.
        steps = self.num_steps.clamp(min=1).double()
        c = AdamCoefficients(
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_eps,
            lr=lr,
            clip_factor=norm.clip_factor,
            bias_correction1=(1.0 - config.adam_beta1**steps).float(),
            bias_correction2=(1.0 - config.adam_beta2**steps).float(),
            largest_update=None,
            skip=skip,
        )
        cut = self.precision.exp_avg_sq.root  # see `fp8lm.optim.bounds`
        return replace(c, largest_update=update_bound(c)) if cut else c

    def _next_scales(self, bounds: Tensor) -> Tensor:
        """Scales [W,4] of the new model parameters, masters, m and v."""
        w, m, v = bounds.unbind(dim=1)
        master, exp_avg, exp_avg_sq = self._state_formats
        model = torch.ones_like(w)
        for fmt, of_format in self._in_format.items():
            model = torch.where(of_format, scale_from_amax(w, fmt), model)
        scales = (
            model,
            scale_from_amax(w, master),
            scale_from_amax(m, exp_avg),
            scale_from_amax(v, exp_avg_sq),
        )
        return torch.stack(scales, dim=1)

    def _largest_states(self, scales: Tensor) -> Tensor:
        """The largest master, m and v that can be stored with `scales`, [W,3]."""
        columns = zip(scales[:, 1:].unbind(dim=1), self._state_formats, strict=True)
        return torch.stack([largest_value(scale, fmt) for scale, fmt in columns], dim=1)

    def _noise_keys(self) -> Tensor:
        """Noise keys of the weights in this step, int32 [W]."""
        return (self.num_steps * _STEP_KEY + self._name_keys).to(torch.int32)

    def _adam_param(self, name: str, gradient: ScaledTensor) -> AdamParam:
        weight, state, rows = (
            self.weights[name],
            self.states[name],
            self.sharding.local_shards[name],
        )
        spec = weight.spec
        first = rows[0] * (spec.numel // spec.local_shape[0])
        return AdamParam(
            row=self._rows[name],
            gradient=gradient,
            model_param=weight.model_param.rows(*rows) if state.owns_master else None,
            master=state.master,
            exp_avg=state.exp_avg,
            exp_avg_sq=state.exp_avg_sq,
            weight_decay=self.config.weight_decay * spec.decay,
            index=spec.shard_spec.element_index(spec.shape, first),
        )


def _zeros(shape: torch.Size, fmt: Format, scale: Tensor) -> ScaledTensor:
    return ScaledTensor(torch.zeros(shape, dtype=fmt.storage, device=scale.device), scale, fmt)


def _replace(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    target.copy_(value if skip is None else torch.where(skip, target, value))
