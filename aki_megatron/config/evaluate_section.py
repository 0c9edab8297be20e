"""The section ``evaluate`` of a run: benchmarks that another job answers with its checkpoints while it trains."""

from typing import Annotated

from pydantic import BeforeValidator

from aki_megatron.config.section import FilePath, NonNegativeInt, Section, Strings, as_tuple


class EvaluateConfig(Section):
    """Evaluation of checkpoints by another job; docs/evaluation.md. It changes nothing that is trained."""

    interval: NonNegativeInt = 0
    """Optimizer steps between evaluated checkpoints: a multiple of checkpoint.interval. 0: none is evaluated."""
    command: Strings = ("sbatch", "slurm/evaluate.sbatch")
    """Command that begins an evaluation, word by word; the arguments of tools/evaluate.py run follow it. Training does
    not wait for it. Without Slurm: [python, tools/evaluate.py]."""
    benchmarks: Strings = ()
    """Benchmarks to answer; empty: all whose files are there."""
    data: Annotated[tuple[FilePath, ...], BeforeValidator(as_tuple)] = ()
    """Folders of the benchmarks' files; empty: where tools/evaluate.py looks by default."""
    per_benchmark: NonNegativeInt = 0
    """About so many questions of each benchmark; 0: all."""
    flags: Strings = ()
    """Further flags of tools/evaluate.py run, for example [--batch_size, "64"]."""
