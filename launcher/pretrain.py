"""Pretrain a vision-language model on captions. Every rank runs this file.

deepspeed launcher/pretrain.py --ds_config configs/zero3.json
torchrun --nproc_per_node 8 launcher/pretrain.py --config configs/aki4b/pretrain.yaml
mpirun -np 8 python launcher/pretrain.py --config configs/aki4b/pretrain.yaml
python launcher/pretrain.py --help
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("aki_megatron") is None:  # a checkout that was not installed with pip
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aki_megatron.train.cli import run_launcher  # noqa: E402

if __name__ == "__main__":
    sys.exit(run_launcher("pretrain", sys.argv[1:], os.environ))
