"""How a run's samples become micro-batches, steps and tokens, and how long its pipeline is idle."""

from __future__ import annotations

from dataclasses import dataclass

from fp8lm.config import Config
from fp8lm.optim.schedule import BatchSize
from fp8lm.parallel.pipeline_schedule import simulate
from fp8lm.parallel.stages import schedule_maker
from fp8lm.training.run_length import check_batches, end_of_run


@dataclass(frozen=True)
class Batches:
    """Arithmetic of the steps; with a ramp-up, `num_microbatches` and `bubble` are those after it.

    `bubble` is the idle share of a stage's time, if a backward takes twice as long as a forward and
    messages no time.
    """

    micro_batch_size: int
    num_microbatches: int
    num_replicas: int
    seq_length: int
    iterations: int
    samples: int
    bubble: float

    @property
    def global_batch_size(self) -> int:
        """Samples of one step."""
        return self.micro_batch_size * self.num_microbatches * self.num_replicas

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""
        return self.global_batch_size * self.seq_length

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.samples * self.seq_length


def plan_batches(config: Config, num_replicas: int) -> Batches:
    """The steps of `config` on `num_replicas` replicas; InputError if batches do not divide."""
    check_batches(config, num_replicas)
    train, parallel = config.train, config.parallel
    microbatches = train.global_batch_size // (train.micro_batch_size * num_replicas)
    make = schedule_maker(
        parallel.pipeline_schedule,
        parallel.pipeline_model_parallel_size,
        parallel.num_chunks(config.model.num_layers),
    )
    iterations, samples = end_of_run(train, BatchSize(train, num_replicas))
    return Batches(
        micro_batch_size=train.micro_batch_size,
        num_microbatches=microbatches,
        num_replicas=num_replicas,
        seq_length=config.model.seq_length,
        iterations=iterations,
        samples=samples,
        bubble=simulate(make(microbatches), microbatches).bubble,
    )
