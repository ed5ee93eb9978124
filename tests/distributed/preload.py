"""What every worker needs and takes seconds to import; see `tests.distributed.pool`.

The package imports megatron-core where it is used, so it has to be named here: in every worker by
itself it would take ten seconds of CPU.
"""

import pytest  # noqa: F401
import torch.distributed  # noqa: F401

import fp8lm.training.hooks  # noqa: F401
from fp8lm.runtime.quiet import quiet_megatron

with quiet_megatron():
    import megatron.core.datasets.blended_megatron_dataset_builder
    import megatron.core.datasets.gpt_dataset
    import megatron.core.num_microbatches_calculator
    import megatron.core.optimizer_param_scheduler  # noqa: F401
import tensorboard.compat.proto.event_pb2
import tensorboard.summary.writer.record_writer  # noqa: F401
