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
    now = psutil.Process().memory_info().rss
    # The kernel counts both lazily: the peak can be read a few pages behind.
    peak = max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    report = {"memory/rss": now, "memory/rss_peak": peak}
    if device.type == "cuda":
        report["memory/gpu"] = torch.cuda.memory_allocated(device)
        report["memory/gpu_peak"] = torch.cuda.max_memory_allocated(device)
    return report
