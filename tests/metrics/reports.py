"""What one report holds."""

VALUES = {
    "consumed_samples": 25600,
    "lm loss": 3.14152,
    "learning-rate": 1e-4,
    "batch-size": 256,
    "grad-norm": 0.5117,
    "params-norm": 20.5,
    "throughput": 612.03,
    "iteration-time": 0.81234,
    "skipped iterations": 0,
    "nan iterations": 0,
}
