"""A process of its own that loads steps with worker processes until something fails: ``FAULT WORKERS``.

The error stays referenced until the interpreter ends, as where a caller keeps it: workers must end all the same.
"""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.batch_planner import BatchPlanner, Phase
from aki_megatron.data.loader import MicrobatchDataset, StepLoader
from aki_megatron.data.sample_stream import LoadedSample
from aki_megatron.errors import DataError, UserError
from aki_megatron.types import IGNORE, DecodedImage, Sample, image_items

IMAGE_SIZE = 64


class FailingStream:
    """Sample n has n as its target; what happens at sample 100 is the fault."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def sample(self, n: int, *, replace_images: bool = True) -> LoadedSample:
        if self.fault == "killed" and n == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "user error" and n == 100:
            raise DataError("row 100 is broken")
        if self.fault == "bug" and n == 100:
            raise RuntimeError("a bug at row 100")
        if self.fault == "slow":
            time.sleep(0.02)
        image = DecodedImage(bytes(3 * IMAGE_SIZE**2), IMAGE_SIZE)
        return LoadedSample(
            Sample(f"numbers/{n}", [n] * 4, [1, 1, 1, 2], [IGNORE, IGNORE, n, IGNORE], image_items(image)), ()
        )

    def length(self, n: int) -> tuple[int, int]:
        return 4, 1


def main(fault: str, num_workers: int) -> None:
    stream = FailingStream(fault)
    planner = BatchPlanner([Phase(10**9, stream)], global_batch_size=8, micro_batch_size=2)
    dataset = MicrobatchDataset([stream], pad_id=0, image_size=IMAGE_SIZE, sequence_length=None)
    loader = StepLoader(planner, dataset, bad_sample_budget=BadSampleBudget(0.0), num_workers=num_workers)
    steps = loader.steps(0)
    next(steps)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "an error could strike the main thread anywhere"
    workers = multiprocessing.active_children()
    if fault == "exit":
        return
    for _ in range(50):
        next(steps)
    if fault == "slow":
        Path(sys.argv[3]).write_text(" ".join(str(worker.pid) for worker in workers))
        while True:
            next(steps)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except UserError as error:
        KEPT = error
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
