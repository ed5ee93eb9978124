"""What every worker needs and takes seconds to import; see `tests.distributed.pool`."""

import fp8lm.comm.groups  # noqa: F401  (megatron-core, quietly)
import pytest  # noqa: F401
import torch.distributed  # noqa: F401
