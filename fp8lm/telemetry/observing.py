"""Observes every cast of a step: of layers, sums of gradients, optimizer states and messages.

    input, weight, grad_output         operands of a layer's GEMMs, at its quantizers
    main_grad                          every addition to a weight's sum of gradients
    master, exp_avg, exp_avg_sq        the optimizer's states, and the weight if it is stored as its
                                       GEMMs read it
    reduce_output, reduce_grad_input   partial sums of a layer's output and of its input's gradient
                                       on their way to other tensor-parallel ranks
    send_grad                          a sum of gradients on its way to the rank that steps it
    send                               what a pipeline stage sends; its layer is `pipeline.stageN`

The last three only where they are cast for that. Observers are in place while `observing` only, so
any other step runs no operation more. A layer whose GEMMs have fallen back to BF16 is observed as
if it had not: its operands are cast by the recipe as well, which tells when it may return. With
`what_if` a layer whose GEMMs the recipe has in BF16 or fp32 is observed as if it had them in FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Protocol

from torch import Tensor, nn

from fp8lm.kernels.adam_table import AdamCoefficients, AdamParam, AdamTable
from fp8lm.kernels.interface import Kernels
from fp8lm.layers.linear import Linear
from fp8lm.layers.param import QuantizedParam
from fp8lm.layers.quantizer import TENSOR_KINDS, Quantizer, TensorKind
from fp8lm.layers.recipe import FP8_GEMM
from fp8lm.layers.tp_context import TPComm
from fp8lm.numerics import Format
from fp8lm.optim import AdamW
from fp8lm.scaled_tensor import ScaledTensor
from fp8lm.telemetry.adam import STATE_KINDS, step_casts
from fp8lm.telemetry.statistics import measure, measure_all, sample
from fp8lm.telemetry.table import Row, StatisticsTable

REDUCED = ("reduce_output", "reduce_grad_input")
KINDS = (*TENSOR_KINDS, "main_grad", *STATE_KINDS, *REDUCED, "send_grad")
_WEIGHT = ".weight"


class Observable(Protocol):
    """Calls its observer after every cast."""

    observer: Any


class ModelObserver:
    """Observes layers `linears` and the matrices among `optimizer.weights`, by name.

    Only those whose layer matches one of `patterns`, in which `*` stands for anything. `buckets`
    and `pipeline` send gradients and activations, if anything does. `what_if`: see the module.
    """

    def __init__(
        self,
        linears: Mapping[str, Linear],
        optimizer: AdamW,
        kernels: Kernels,
        patterns: Sequence[str] = ("*",),
        *,
        buckets: Observable | None = None,
        pipeline: tuple[int, Observable] | None = None,
        what_if: bool = False,
    ) -> None:
        self.what_if = what_if
        self.linears = {name: linear for name, linear in linears.items() if chosen(name, patterns)}
        self.optimizer, self.kernels = optimizer, kernels
        self.buckets, self.pipeline = buckets, pipeline
        self.weights: dict[str, QuantizedParam] = {
            name.removesuffix(_WEIGHT): weight
            for name, weight in optimizer.weights.items()
            if isinstance(weight, QuantizedParam) and chosen(name.removesuffix(_WEIGHT), patterns)
        }

    @property
    def rows(self) -> list[Row]:
        """The rows that this rank may observe."""
        layers = dict.fromkeys((*self.linears, *self.weights))
        stage = [] if self.pipeline is None else [_row_of_stage(self.pipeline[0])]
        return [(layer, kind) for layer in layers for kind in KINDS] + stage

    @contextmanager
    def observing(self, table: StatisticsTable) -> Iterator[None]:
        """Add all casts within the context to `table`."""
        with ExitStack() as stack:
            for target, observer in self._observers(table):
                stack.enter_context(_observed(target, observer))
            for layer, linear in self.linears.items():
                quantizer = self._quantizers(linear)["weight"]
                if quantizer.format != linear.weight.spec.format and not _casts_weight(linear):
                    observer = _WeightObserver(table, (layer, "weight"), self.kernels, quantizer)
                    # After the hook that waits for weights on their way.
                    stack.callback(linear.register_forward_pre_hook(observer).remove)
            yield

    def _quantizers(self, linear: Linear) -> dict[TensorKind, Quantizer]:
        """Those whose casts are measured, whether `linear` uses them or not."""
        recipe = linear.recipe_quantizers
        supposed = self.what_if and not recipe["weight"].format.scaled
        return fp8_quantizers(linear) if supposed else recipe

    def _observers(self, table: StatisticsTable) -> Iterator[tuple[Observable, object]]:
        """Everything that casts, and what observes it."""
        kernels = self.kernels
        for layer, linear in self.linears.items():
            measured, path = self._quantizers(linear), linear.path
            for kind, quantizer in linear.quantizers.items():
                yield quantizer, _CastObserver(table, (layer, kind), kernels, measured[kind])
            for reduced, comm in zip(REDUCED, (path.output_comm, path.input_comm), strict=True):
                yield comm, _CastObserver(table, (layer, reduced), kernels)
        for layer, weight in self.weights.items():
            yield weight.main_grad, _SumObserver(table, (layer, "main_grad"), kernels)
        yield self.optimizer, _StepObserver(table, self._observed_rows(), kernels)
        if self.buckets is not None:
            names = {layer + _WEIGHT: (layer, "send_grad") for layer in self.weights}
            yield self.buckets, _BucketObserver(table, names, kernels)
        if self.pipeline is not None:
            stage, sender = self.pipeline
            yield sender, _CastObserver(table, _row_of_stage(stage), kernels)

    def _observed_rows(self) -> dict[int, dict[str, Row]]:
        """Rows of the table by row of the optimizer's and kind of state."""
        numbers = {name: number for number, name in enumerate(self.optimizer.weights)}
        found = {}
        for layer, weight in self.weights.items():
            kinds = STATE_KINDS if self._is_cast(layer, weight) else (*STATE_KINDS, "weight")
            found[numbers[layer + _WEIGHT]] = {kind: (layer, kind) for kind in kinds}
        return found

    def _is_cast(self, layer: str, weight: QuantizedParam) -> bool:
        """Whether casts of the stored weight for its GEMMs are measured."""
        quantizer = weight.quantizer
        if layer in self.linears:
            quantizer = self._quantizers(self.linears[layer])["weight"]
        return quantizer.format != weight.spec.format


def _row_of_stage(stage: int) -> Row:
    return f"pipeline.stage{stage}", "send"


def chosen(layer: str, patterns: Sequence[str]) -> bool:
    """Whether `layer` matches one of `patterns`."""
    return any(fnmatchcase(layer, pattern) for pattern in patterns)


def linears_of(chunks: Sequence[nn.Module]) -> dict[str, Linear]:
    """The linear layers of this rank's parts of the model, by their path."""
    return {
        name: module
        for chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, Linear)
    }


def _casts_weight(linear: Linear) -> bool:
    """Whether the layer's own quantizer is called with its weight, and so can be observed."""
    return linear.quantizers["weight"].format != linear.weight.spec.format


def fp8_quantizers(linear: Linear) -> dict[TensorKind, Quantizer]:
    """Those that `linear` would have in FP8 with current scaling and a scale per tensor."""
    path, of_weight = linear.path, linear.recipe_quantizers["weight"]
    share, kernels = of_weight.share_amax, path.kernels

    def quantizer(fmt: Format, comm: TPComm) -> Quantizer:
        return Quantizer(fmt, kernels, share_amax=share if comm.gathers else None)

    return {
        "input": quantizer(FP8_GEMM.input, path.input_comm),
        "grad_output": quantizer(FP8_GEMM.grad_output, path.output_comm),
        "weight": Quantizer(
            FP8_GEMM.weight, kernels, share_amax=share, sharded_dim=of_weight.sharded_dim
        ),
    }


class _CastObserver:
    """Measures a cast, or what `recipe` would make of the tensor if that has another format."""

    def __init__(
        self,
        table: StatisticsTable,
        row: Row,
        kernels: Kernels,
        recipe: Quantizer | None = None,
    ) -> None:
        self._table, self._row, self._kernels, self._recipe = table, row, kernels, recipe

    def __call__(self, x: Tensor, quantized: ScaledTensor) -> None:
        if self._recipe is not None and quantized.format != self._recipe.format:
            quantized = self._recipe(x)
        self._table.add(self._row, measure(x, quantized, self._kernels))


class _WeightObserver:
    """Measures what `quantizer` would make of a weight that its layer reads as it is stored.

    Called before each forward of the layer.
    """

    def __init__(
        self, table: StatisticsTable, row: Row, kernels: Kernels, quantizer: Quantizer
    ) -> None:
        self._table, self._row, self._kernels = table, row, kernels
        self._quantizer = quantizer

    def __call__(self, linear: Linear, _: object) -> None:
        w = self._kernels.dequantize(linear.weight.model_param)
        self._table.add(self._row, measure(w, self._quantizer(w), self._kernels))


class _SumObserver:
    """Measures what additions to a sum of gradients lose, on a sample of its elements."""

    def __init__(self, table: StatisticsTable, row: Row, kernels: Kernels) -> None:
        self._table, self._row, self._kernels = table, row, kernels

    def __call__(self, total: ScaledTensor, dw: Tensor, is_empty: bool) -> Callable[[], None]:
        part, dw = sample(total, dw)  # a view, which sees what is added
        before = None if is_empty else self._kernels.dequantize(part).clone()
        exact = dw.float() if before is None else before + dw

        def finish() -> None:
            measured = measure_all(exact, part, self._kernels, before=before)
            self._table.add(self._row, measured)

        return finish


class _BucketObserver:
    """Measures casts of gradients that are sent; `rows` by name of the weight."""

    def __init__(self, table: StatisticsTable, rows: Mapping[str, Row], kernels: Kernels) -> None:
        self._table, self._rows, self._kernels = table, rows, kernels

    def __call__(self, name: str, exact: Tensor, sent: ScaledTensor) -> None:
        if name in self._rows:
            self._table.add(self._rows[name], measure(exact, sent, self._kernels))


class _StepObserver:
    """Measures the casts of an optimizer step; `rows` by row of the optimizer's table."""

    def __init__(
        self, table: StatisticsTable, rows: Mapping[int, Mapping[str, Row]], kernels: Kernels
    ) -> None:
        self._table, self._rows, self._kernels = table, rows, kernels

    def __call__(
        self, params: Sequence[AdamParam], table: AdamTable, coefficients: AdamCoefficients
    ) -> None:
        for param in params:
            rows = self._rows.get(param.row, {})
            if rows:
                self._observe(param, table, coefficients, rows)

    def _observe(
        self,
        param: AdamParam,
        table: AdamTable,
        coefficients: AdamCoefficients,
        rows: Mapping[str, Row],
    ) -> None:
        for kind, exact, stored, before in step_casts(self._kernels, param, table, coefficients):
            if kind in rows:
                measured = measure_all(exact, stored, self._kernels, before=before)
                self._table.add(rows[kind], measured)


@contextmanager
def _observed(target: Observable, observer: object) -> Iterator[None]:
    """Set `target.observer` within the context."""
    former, target.observer = target.observer, observer
    try:
        yield
    finally:
        target.observer = former
