"""Functions run by several real processes that stay alive from one test to the next.

Importing torch and megatron-core takes seconds of CPU, so one server imports them once, and the
workers are forked from it: a new pool takes a fraction of a second, a call of a standing pool
milliseconds. Tests use the fixture of the same name:

    def gather(x):                        # module level: workers import it by name
        return ...                        # the default process group is gloo, ready for use

    def test_gather(run_distributed):
        results = run_distributed(gather, 4, x)        # list of results, one per rank
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
TIMEOUT = 150.0  # of what hangs: a busy machine takes several times as long as an idle one
START_TIMEOUT = 100.0  # the first workers wait for seconds of imports


class Pools:
    """Pools of workers, one for each number of ranks, started when first needed."""

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._pools = {}

    def run(self, function: Callable, world_size: int, *args, timeout: float = TIMEOUT) -> list:
        """`function(*args)` on each of `world_size` ranks; their results, in rank order.

        Raises the exception of the rank that failed first, with its traceback as a note;
        TimeoutError naming the ranks that have not answered after `timeout` seconds. After either
        the pool's processes are killed, and the next call starts new ones.
        """
        if world_size not in self._pools:
            _start_server(self._context)
            self._pools[world_size] = Pool(self._context, world_size)
        try:
            return self._pools[world_size].run(function, args, timeout)
        except BaseException:
            self._pools.pop(world_size).kill()
            raise

    def close(self):
        """End all workers."""
        while self._pools:
            self._pools.popitem()[1].kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Pool:
    """`world_size` processes joined in a gloo group."""

    def __init__(self, context, world_size):
        # Here, not in rank 0, and on any free port: parallel sessions never meet.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve,
                args=(theirs, self._store.port, rank, world_size),
                name=f"rank {rank} of {world_size}",
                daemon=True,
            )
            process.start()
            theirs.close()  # so that a worker's death is the end of the file here
            self._connections.append(ours)
            self._processes.append(process)
        try:
            self._answers("start", START_TIMEOUT)
        except BaseException:
            self.kill()
            raise

    def run(self, function, args, timeout):
        """See `Pools.run`."""
        task = pickle.dumps((function, args))
        # A worker that has died since the last call is told of with the answers.
        with suppress(BrokenPipeError):
            for pipe in self._connections:
                pipe.send_bytes(task)
        return self._answers(function.__name__, timeout)

    def _answers(self, to, timeout):
        deadline = time.monotonic() + timeout
        results, silent = {}, dict(enumerate(self._connections))
        while silent:
            ready = connection.wait(silent.values(), max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(
                    f"{to}: no answer from rank {', '.join(map(str, silent))} of "
                    f"{len(self._connections)} within {timeout:g} s"
                )
            for rank in [rank for rank, pipe in silent.items() if pipe in ready]:
                results[rank] = self._receive(rank, silent.pop(rank))
        return [results[rank] for rank in range(len(results))]

    def _receive(self, rank, pipe):
        try:
            error, value = pickle.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            process = self._processes[rank]
            process.join(5)
            raise RuntimeError(f"{process.name} died: exit code {process.exitcode}") from None
        if error is not None:
            raise error
        return value

    def kill(self):
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._connections, strict=True):
            process.join()
            pipe.close()


def serve(pipe, port, rank, world_size):
    """A worker: join the group, then answer calls until the other end closes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    pipe.send_bytes(pickle.dumps((None, None)))
    gc.freeze()  # what is imported stays: a collection looks at what a call has left, and is quick
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        except Exception as error:  # a module that cannot be imported here
            pipe.send_bytes(failure(error, rank, world_size))
            continue
        try:
            result = function(*args)
            gc.collect()  # a run's cycles, with its process groups and their threads, which poll
            dist.barrier()  # a collective too many on one rank is this test's fault, not the next's
            reply = pickle.dumps((None, result))
        except Exception as error:
            reply = failure(error, rank, world_size)
        pipe.send_bytes(reply)


def failure(error, rank, world_size):
    """The reply that raises `error` at the caller, or its text if it cannot be pickled."""
    trace = f"on rank {rank} of {world_size}:\n{''.join(traceback.format_exception(error))}"
    try:
        error.add_note(trace)
        reply = pickle.dumps((error, None))
        pickle.loads(reply)
    except Exception:
        return pickle.dumps((RuntimeError(trace), None))
    return reply


def _start_server(context):
    """Start the server that workers are forked from, unless it runs already."""
    context.set_forkserver_preload(["tests.distributed.preload"])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # It reads these when it starts: this checkout, whatever is installed, and one thread a worker.
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
