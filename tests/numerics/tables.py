"""Every code of a small float format decoded from its bit fields in plain Python."""

from __future__ import annotations

import math

import torch

from fp8lm.numerics import E2M5, E4M3, E5M2, Format


def code_values(fmt: Format) -> list[float]:
    """The numbers that the 256 codes of `fmt` stand for; NaN and infinities included."""
    return [{E4M3: _e4m3, E5M2: _e5m2, E2M5: _e2m5}[fmt](code) for code in range(256)]


def all_codes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.int16).to(torch.uint8)


def finite_codes(fmt: Format) -> torch.Tensor:
    """The codes of finite numbers, in increasing order of magnitude, positive then negative."""
    return torch.tensor(
        [code for code, value in enumerate(code_values(fmt)) if math.isfinite(value)],
        dtype=torch.uint8,
    )


def finite_values(fmt: Format) -> torch.Tensor:
    """fp32 values of `finite_codes(fmt)`."""
    return torch.tensor([value for value in code_values(fmt) if math.isfinite(value)])


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:  # no infinities: one NaN for each sign
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (8 + mantissa) * 2.0 ** (exponent - 7 - 3)


def _e2m5(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 5) & 0x3, code & 0x1F
    if exponent == 0:
        return sign * mantissa * 2.0**-5
    return sign * (32 + mantissa) * 2.0 ** (exponent - 1 - 5)


def _e5m2(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 2) & 0x1F, code & 0x3
    if exponent == 0x1F:
        return sign * math.inf if mantissa == 0 else math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-16
    return sign * (4 + mantissa) * 2.0 ** (exponent - 15 - 2)
