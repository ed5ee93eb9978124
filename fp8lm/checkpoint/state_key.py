"""The names of a run's tensors in a checkpoint: the one place that formats and parses them.

    model.PARAM.{payload,scale}                                    weight
    optimizer.{master,exp_avg,exp_avg_sq}.PARAM.{payload,scale}    AdamW's states of a weight
    optimizer.amax.PARAM                                           true amaxes of master, m and v
    optimizer.num_steps                                            steps taken
    gradient.mu.PARAM                                              scaling of an FP8 reduction
    scaling.amax_history.LAYER.{input,weight,grad_output}          amaxes, for delayed scaling
    window                                                         sums since the last report

PARAM is the parameter's name in the model (Megatron's), with dots of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

_SECTIONS = {
    "weight": "model",
    "master": "optimizer.master",
    "exp_avg": "optimizer.exp_avg",
    "exp_avg_sq": "optimizer.exp_avg_sq",
    "amax": "optimizer.amax",
    "num_steps": "optimizer.num_steps",
    "mu": "gradient.mu",
    "amax_history": "scaling.amax_history",
    "window": "window",
}
FIELDS = ("payload", "scale")
_FIELDS = {
    **dict.fromkeys(("weight", "master", "exp_avg", "exp_avg_sq"), FIELDS),
    "amax_history": ("input", "weight", "grad_output"),
}
_OF_THE_RUN = ("num_steps", "window")  # kinds that belong to no parameter


@dataclass(frozen=True, order=True)
class StateKey:
    """Which tensor of a training state: a `kind`, of a `param`, its `field`.

    `param` is empty for `num_steps` and `window`, and a layer for `amax_history`; `field` is
    payload or scale for what is a `ScaledTensor`, which of a layer's tensors for `amax_history`,
    else empty. ValueError for any other combination.
    """

    kind: str
    param: str = ""
    field: str = ""

    def __post_init__(self) -> None:
        fields = _FIELDS.get(self.kind, ("",))
        known = self.kind in _SECTIONS and self.field in fields
        if not known or bool(self.param) == (self.kind in _OF_THE_RUN):
            raise ValueError(f"no tensor of a training state: {self!r}")

    def __str__(self) -> str:
        """The name in a checkpoint."""
        return ".".join(filter(None, (self.section, self.param, self.field)))

    @property
    def section(self) -> str:
        """What the names of its kind begin with."""
        return _SECTIONS[self.kind]

    @classmethod
    def parse(cls, name: str) -> StateKey | None:
        """The key whose `str` is `name`; None where a training state has no such tensor."""
        for kind, section in _SECTIONS.items():
            if name == section or name.startswith(f"{section}."):
                param, field = name[len(section) + 1 :], ""
                if kind in _FIELDS:
                    param, _, field = param.rpartition(".")
                try:
                    key = cls(kind, param, field)
                except ValueError:
                    return None
                return key if str(key) == name else None
        return None
