"""What every worker needs and takes seconds to import; see `tests.distributed.pool`."""

import pytest  # noqa: F401
import torch.distributed  # noqa: F401

import fp8lm.comm.groups  # noqa: F401  (megatron-core, quietly)
