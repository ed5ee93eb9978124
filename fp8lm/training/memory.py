"""How much memory this process takes."""

from __future__ import annotations

import resource
import sys

import psutil
import torch


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Bytes now and at the peak: `memory/rss` of the process, `memory/gpu` of tensors on a GPU."""
    # Linux reports the peak in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    report = {
        "memory/rss": psutil.Process().memory_info().rss,
        "memory/rss_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }
    if device.type == "cuda":
        report["memory/gpu"] = torch.cuda.memory_allocated(device)
        report["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return report
