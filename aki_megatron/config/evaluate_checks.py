"""Checks of the section ``evaluate`` against the other sections of a run."""

from collections.abc import Iterator

from aki_megatron.config.run import RunConfig


def evaluate_problems(run: RunConfig) -> Iterator[str]:
    """Check that what is to be evaluated is saved, and kept until the other job reads it."""
    interval, checkpoint = run.evaluate.interval, run.checkpoint
    if interval == 0:
        return
    if interval % checkpoint.interval:
        nearest = max(1, round(interval / checkpoint.interval)) * checkpoint.interval
        yield (
            f"evaluate.interval={interval} must be a multiple of checkpoint.interval={checkpoint.interval}: what is "
            f"evaluated are checkpoints; set it to {nearest}."
        )
    elif not checkpoint.keep_every or interval % checkpoint.keep_every:
        yield (
            f"checkpoint.keep_every={checkpoint.keep_every} may delete a checkpoint of evaluate.interval={interval} "
            f"before its evaluation has read it; set checkpoint.keep_every to {interval}."
        )
    if not run.evaluate.command or not all(word.strip() for word in run.evaluate.command[:1]):
        yield "evaluate.command is empty; give [sbatch, slurm/evaluate.sbatch] or [python, tools/evaluate.py]."
