"""How questions are put to a model until the user chooses otherwise: as in its training."""

from dataclasses import dataclass
from pathlib import Path

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.run_text import run_sources
from aki_megatron.config.datasets import DATASET_FORMAT
from aki_megatron.config.source_checks import MULTI_TURN
from aki_megatron.data.sources.vqav2 import PROMPT

HISTORIES = ("conversation", "again", "alone")
"""What a question is asked with: the conversation before it, that and the picture again, or the picture only."""


@dataclass(frozen=True)
class Wording:
    """How questions are put.

    instruction  text before every question
    history      one of HISTORIES
    """

    instruction: str = ""
    history: str = HISTORIES[0]

    def __post_init__(self) -> None:
        assert self.history in HISTORIES, self.history


DEFAULT_WORDING = Wording()


def trained_wording(path: Path) -> Wording:
    """Return how a checkpoint was asked in its training; the default for an exported folder, which does not say.

    A model that has seen no conversations of several turns is asked every question alone. One that was trained on
    public datasets with short answers only gets their instruction, without which it mistakes one task for another.
    """
    sources = run_sources(path) if (path / files.CONFIG).is_file() else ()
    if not sources:
        return DEFAULT_WORDING
    is_single = all(source.split_turns for source in sources)
    is_short = all(source.format == DATASET_FORMAT and source.name != MULTI_TURN for source in sources)
    return Wording(PROMPT.format(question="").strip() if is_short else "", "alone" if is_single else HISTORIES[0])
