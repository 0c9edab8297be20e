"""Where samples come from and how they are mixed."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from aki_megatron.config.section import FilePath, Section, Strings, _tuple

SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The papers' system message (AKI, Table 5)."""

SourceName = Literal["vqav2", "vsr", "aokvqa", "refcoco"]


class SourceConfig(Section):
    """One fine-tuning dataset and its share of the mixture."""

    name: SourceName
    """Dataset whose reader is used."""
    weight: PositiveFloat
    """Relative; the weights of a run are normalized (papers, Table 4)."""


class DataConfig(Section):
    """Either captions from webdataset tars (pretraining) or conversations from annotation files (fine-tuning)."""

    kind: Literal["captions", "conversations"]
    """captions for pretraining, conversations for fine-tuning."""
    root: FilePath
    """Folder that holds the annotation files and images of every source; relative shard patterns start here too."""
    shards: Strings = ()
    """Tars of (jpg | png, txt) pairs; braces expand: ``captions/{00000..00007}.tar``. For kind captions."""
    sources: Annotated[tuple[SourceConfig, ...], BeforeValidator(_tuple)] = ()
    """For kind conversations."""
    tokenizer: FilePath
    """Hugging Face tokenizer folder with Phi-3's special tokens."""
    system_message: str = SYSTEM_MESSAGE
    """Opens every conversation."""
    max_text_tokens: PositiveInt
    """Longest text in tokens, markers included, image places not (papers, Table 3: 128 and 512)."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of unreadable samples past which the run stops."""
    prefetch_steps: PositiveInt = 2
    """Optimizer steps of batches prepared ahead in the background."""
