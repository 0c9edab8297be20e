"""Fine-tune a vision-language model on conversations. Every rank runs this file.

deepspeed launcher/sft.py --ds_config configs/zero3.json
torchrun --nproc_per_node 8 launcher/sft.py --config configs/aki4b/sft.yaml
mpirun -np 8 python launcher/sft.py --config configs/aki4b/sft.yaml
python launcher/sft.py --help
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("aki_megatron") is None:  # a checkout that was not installed with pip
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aki_megatron.train.cli import run_launcher  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_launcher("sft", sys.argv[1:], os.environ))
