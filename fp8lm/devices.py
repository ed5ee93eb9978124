"""Messages about GPUs that this project cannot use."""

from __future__ import annotations

NO_ROCM = (
    "this PyTorch is a ROCm build for AMD GPUs, whose FP8 formats are others: use an NVIDIA GPU or "
    "train.device=cpu"
)
NO_NCCL = (
    "this PyTorch has no NCCL, through which processes on GPUs talk: install a CUDA build that has "
    "it, or use train.device=cpu"
)
