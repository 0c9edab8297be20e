"""Checks of what trains, for config/cross_checks.py: sentences with keys, their values, and what to change."""

from collections.abc import Iterator

from aki_megatron.config.run import RunConfig
from aki_megatron.config.trainable import PARTS, PartConfig, PhaseTrainable, TrainableConfig, phase_table


def trainable_problems(run: RunConfig) -> Iterator[str]:
    """Check the table of every phase."""
    phases = run.data.phases
    modes = set()
    for number, phase in enumerate([phase.trainable for phase in phases] or [PhaseTrainable()]):
        table = phase_table(run.trainable, phase)
        keys = {
            name: f"data.phases[{number}].trainable.{name}" if getattr(phase, name) else f"trainable.{name}"
            for name in PARTS
        }
        modes.add(table["decoder"].mode)
        if all(part.is_frozen for part in table.values()):
            where = f"data.phases[{number}]" if phases else "trainable"
            yield f"{where} trains nothing: every part is frozen; let one of {', '.join(PARTS)} train (mode: full)."
        if run.model.decoder.tie_word_embeddings and table["embeddings"] != table["head"]:
            yield (
                f"{keys['embeddings']} and {keys['head']} differ, but model.decoder.tie_word_embeddings=true: the LM "
                "head is the embedding table; give both the same mode, lr_factor and weight_decay."
            )
    for key, frozen in _frozen_with_rates(run):
        yield (
            f"{key} has lr_factor={frozen.lr_factor:g} and weight_decay={frozen.weight_decay}, but mode=frozen: "
            "they change nothing; remove them, or set mode to full."
        )
    if {"lora", "full"} <= modes:
        yield (
            "trainable.decoder.mode is lora in one phase and full in another, so that the same maps would train twice "
            "over; use lora or full in all phases that train the decoder, or start a second run from the first "
            "(--init.weights), which merges the adapters."
        )


def _frozen_with_rates(run: RunConfig) -> Iterator[tuple[str, PartConfig]]:
    """Yield key and value of every frozen part with settings of its training."""
    tables: list[tuple[str, TrainableConfig | PhaseTrainable]] = [("trainable", run.trainable)]
    tables += [(f"data.phases[{n}].trainable", phase.trainable) for n, phase in enumerate(run.data.phases)]
    for prefix, table in tables:
        for name in PARTS:
            part = getattr(table, name)
            if part is not None and part.is_frozen and (part.lr_factor != 1.0 or part.weight_decay is not None):
                yield f"{prefix}.{name}", part
