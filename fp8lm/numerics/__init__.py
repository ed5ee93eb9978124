"""What a low-precision number is: formats, and how an amax becomes a scale."""

from fp8lm.numerics.accumulation import accumulation_risk, expected_snr
from fp8lm.numerics.formats import (
    BF16,
    E2M5,
    E4M3,
    E5M2,
    FP16,
    FP32,
    ROOT_E4M4,
    Format,
    format_by_name,
)
from fp8lm.numerics.granularity import (
    BLOCK_1X128,
    BLOCK_128X128,
    MX_1X32,
    PER_ROW,
    PER_TENSOR,
    Granularity,
    granularity_by_name,
    granularity_of,
)
from fp8lm.numerics.scaling import largest_value, scale_from_amax

__all__ = [
    "BF16",
    "BLOCK_1X128",
    "BLOCK_128X128",
    "E2M5",
    "E4M3",
    "E5M2",
    "FP16",
    "FP32",
    "MX_1X32",
    "PER_ROW",
    "PER_TENSOR",
    "ROOT_E4M4",
    "Format",
    "Granularity",
    "accumulation_risk",
    "expected_snr",
    "format_by_name",
    "granularity_by_name",
    "granularity_of",
    "largest_value",
    "scale_from_amax",
]
