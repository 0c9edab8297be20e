"""Fine-tune a vision-language model on conversations. Every rank runs this file; it parses, builds and trains.

deepspeed launcher/sft.py --ds_config configs/zero3.json
torchrun --nproc_per_node 8 launcher/sft.py --config configs/aki4b/sft.yaml
mpirun -np 8 python launcher/sft.py --config configs/aki4b/sft.yaml
python launcher/sft.py --help
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if find_spec("aki_megatron") is None:  # a checkout that was not installed with pip
    sys.path.insert(0, str(ROOT))

from aki_megatron.supervise.signals import StopSignals  # noqa: E402

STOP_SIGNALS = StopSignals()

if __name__ == "__main__":
    STOP_SIGNALS.listen()  # before the imports that follow, which take seconds

from aki_megatron.config.run import RunConfig  # noqa: E402
from aki_megatron.config.start import start  # noqa: E402


def train(run: RunConfig) -> int:
    """Build the run and train it; the exit code."""
    from aki_megatron.train.main import main  # seconds of imports that --help and a wrong flag do not need

    return main(run, os.environ, STOP_SIGNALS)


if __name__ == "__main__":
    sys.exit(
        start(
            sys.argv[1:],
            os.environ,
            STOP_SIGNALS,
            default_config=Path(os.path.relpath(ROOT / "configs/aki4b/sft.yaml")),
            prog="launcher/sft.py",
            description="Fine-tune a vision-language model on conversations.",
            train=train,
        )
    )
