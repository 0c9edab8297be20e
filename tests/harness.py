"""One pool of worker processes per pytest run: importing torch and deepspeed takes seconds, so processes are reused.

``run_on(ranks, function, *args)`` runs ``function(topology, *args)`` on ranks 0 ... ranks-1 of a fresh world and
returns their results in rank order. The function must be at the top level of a module; its arguments and its result
must pickle. With ``tensor=`` and ``pipeline=`` the world is split that way, else all ranks are data ranks.
"""

import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

MAX_RANKS = 8
GRACE_SECONDS = 15.0
"""After the first rank failed, how long the others may take to fail by themselves; then they count as hung."""
PRELOAD = ["torch", "torch.distributed.checkpoint", "deepspeed", "megatron.core"]
MOST_THREADS = 150
"""A worker with more is replaced: groups that something still refers to leave threads behind, and those cost time."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PYTHONWARNINGS": "ignore:Transformer Engine and Apex:UserWarning",
}


class RanksFailedError(Exception):
    """At least one rank raised or hung; the message holds every rank's traceback."""


class Pool:
    """Worker processes, started when first needed and kept until ``close``."""

    def __init__(self) -> None:
        import torch

        self._with_gpus = torch.cuda.is_available()
        self._gpus = torch.cuda.device_count()
        # a fork server imports what takes seconds once for all workers; CUDA does not survive a fork
        self._context = mp.get_context("spawn" if self._with_gpus else "forkserver")
        if not self._with_gpus:
            self._context.set_forkserver_preload(PRELOAD)
        self._workers: list[_Worker | None] = [None] * MAX_RANKS

    def run(
        self,
        ranks: int,
        function: Callable[..., Any],
        *args: Any,
        tensor: int = 1,
        pipeline: int = 1,
        timeout_seconds: float = 300.0,
    ) -> list[Any]:
        """Results of ``function(topology, *args)`` by rank.

        Skips the test where there are GPUs, but fewer than ranks.
        Errors: RanksFailedError when a rank raised, died, or did not answer in time; its workers are replaced.
        """
        assert 1 <= ranks <= MAX_RANKS
        if self._with_gpus and self._gpus < ranks:
            pytest.skip(
                f"{ranks} ranks need a GPU each, this machine shows {self._gpus}; CUDA_VISIBLE_DEVICES= runs on the CPU"
            )
        workers = [self._worker(rank) for rank in range(ranks)]
        port = free_port()
        for rank, worker in enumerate(workers):
            worker.pipe.send((sys.path, function, args, {"tensor": tensor, "pipeline": pipeline}, rank, ranks, port))
        answers = _collect(workers, timeout_seconds)
        if any(not ok for ok, _ in answers):
            for rank, worker in enumerate(workers):
                worker.kill()
                self._workers[rank] = None
            raise RanksFailedError("".join(f"\n--- rank {r}: {text}" for r, (ok, text) in enumerate(answers) if not ok))
        return [result for _, result in answers]

    def close(self) -> None:
        """End all workers."""
        for rank, worker in enumerate(self._workers):
            if worker is not None:
                worker.kill()
                self._workers[rank] = None

    def _worker(self, rank: int) -> "_Worker":
        worker = self._workers[rank]
        if worker is not None and worker.threads() > MOST_THREADS:
            worker.kill()
            worker = None
        if worker is None or not worker.process.is_alive():
            with _environment(ENVIRONMENT if not self._with_gpus else {}):
                worker = self._workers[rank] = _Worker(self._context)
        return worker


class _Worker:
    def __init__(self, context: Any) -> None:
        self.stacks = Path(tempfile.mkstemp(prefix="rank_stack_")[1])
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, self.stacks), daemon=True)
        self.process.start()
        far_end.close()

    def stack(self) -> str:
        """Where the process hangs."""
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self.stacks.read_text()

    def threads(self) -> int:
        """Threads of the process, where /proc tells."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        return len(list(tasks.iterdir())) if tasks.is_dir() else 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.stacks.unlink(missing_ok=True)


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _collect(workers: list[_Worker], timeout_seconds: float) -> list[tuple[bool, Any]]:
    """(True, result) or (False, what went wrong) by rank."""
    answers: dict[int, tuple[bool, Any]] = {}
    rank_of = {worker.pipe: rank for rank, worker in enumerate(workers)}
    deadline = time.monotonic() + timeout_seconds
    while len(answers) < len(workers):
        waiting = [pipe for pipe, rank in rank_of.items() if rank not in answers]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                answers[rank_of[pipe]] = pipe.recv()
            except EOFError:
                process = workers[rank_of[pipe]].process
                process.join()
                answers[rank_of[pipe]] = (False, f"died with exit code {process.exitcode}")
            if not answers[rank_of[pipe]][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for rank, worker in enumerate(workers):
        if rank not in answers:
            answers[rank] = (False, f"no answer; it is here:\n{worker.stack()}")
    return [answers[rank] for rank in range(len(workers))]


def _serve(pipe: Connection, stacks: Path) -> None:
    """A worker's life: join a world, run, leave it, answer."""
    import torch

    with open(stacks, "w") as dump:
        faulthandler.register(signal.SIGUSR1, dump)
        torch.set_num_threads(1)
        while True:
            try:
                path, function, args, split, rank, ranks, port = pipe.recv()
            except (EOFError, OSError):
                return
            sys.path[:] = path
            pipe.send(_answer(function, args, split, rank, ranks, port))


def _answer(
    function: Callable[..., Any], args: tuple[Any, ...], split: dict[str, int], rank: int, ranks: int, port: int
) -> tuple[bool, Any]:
    from aki_megatron.parallel.topology import Launch, init_distributed

    try:
        launch = Launch(
            rank=rank,
            local_rank=rank,
            world_size=ranks,
            local_world_size=ranks,
            launcher="environment",
            master_port=port,
        )
        topology = init_distributed(launch, **split, timeout_seconds=240)
        return True, function(topology, *args)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        _leave_world()


def _leave_world() -> None:
    """Destroy the groups and what libraries remember of them, so that the process can join another world."""
    import torch.distributed as dist
    from deepspeed.comm import comm
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    gc.collect()
    gc.freeze()  # what is left lives on; DeepSpeed collects garbage often, and each time would visit all of it
    groups._release_process_group_references()
    comm.cdb = None
    # it numbers modules and parameters over the life of a process; ranks of one world must agree on the numbers
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0
    if (parallel_state := sys.modules.get("megatron.core.parallel_state")) is not None:
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment that a process started inside inherits."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
