"""Where samples come from, how they are mixed, in which order, and how they fill rows."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from aki_megatron.config.section import FilePath, Section, Strings, _tuple

SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The papers' system message (AKI, Table 5)."""

SourceName = Literal[
    "vqav2",
    "gqa",
    "vsr",
    "ocrvqa",
    "aokvqa",
    "scienceqa",
    "refcoco",
    "refcoco+",
    "refcocog",
    "visualgenome",
    "llava150k",
]

CaptionFormat = Literal["caption", "blip3_ocr"]

Granularity = Literal[
    "basic text", "positions", "fractions", "coarse coordinates", "fine coordinates", "boxes", "official index"
]


class SourceConfig(Section):
    """One fine-tuning dataset and its share of the mixture."""

    name: SourceName
    """Dataset whose reader is used."""
    weight: PositiveFloat = 1.0
    """Relative; the weights of a run are normalized (papers, Table 4). Read where data.mixing is weights."""
    augment: Literal["none", "official"] = "none"
    """official: the released code's random crop and flip, which mirror text and leave boxes behind; for comparison."""
    split_turns: bool = True
    """llava150k: true makes each question and answer a sample of its own, as the papers do; false keeps conversations."""


class CaptionsConfig(Section):
    """One set of webdataset tars and its share of the mixture."""

    name: str
    """A name of your choice, for phases, errors and the ledger."""
    shards: Strings
    """Tars of (jpg | png | jpeg, txt) pairs; braces expand: ``captions/{00000..00007}.tar``. ``pipe:COMMAND`` fetches
    a tar by running a command that writes it to its output."""
    format: CaptionFormat = "caption"
    """What a txt member holds: the caption itself (BLIP3-KALE, CC3M, CC12M), or BLIP3-OCR-200M's JSON list."""
    granularity: Granularity = "basic text"
    """blip3_ocr: which of the list's descriptions is taken; "official index" takes the second, as the released code."""
    weight: PositiveFloat = 1.0
    """Relative; the weights of a run are normalized. Read where data.mixing is weights."""


class PhaseConfig(Section):
    """A run of optimizer steps with a choice of sources and an order of image and text."""

    steps: PositiveInt
    """Optimizer steps of this phase; the phases of a run add up to train.steps."""
    sources: Strings = ()
    """Names of the sources that take part; empty: all."""
    order: Literal["image_first", "text_first"] = "image_first"
    """text_first puts the question (or caption) before the image: dual-order training (papers, section 3.2)."""


class PackingConfig(Section):
    """Several samples in one row, so that hardly any place is padding."""

    enabled: bool = False
    """With packing train.global_batch_size and train.micro_batch_size count rows instead of samples."""
    sequence_length: PositiveInt = 4096
    """Places of a row, image places included."""
    max_images: PositiveInt = 32
    """Most images of a row."""
    buffer_size: PositiveInt = 4096
    """Samples that are dealt into rows at a time: more fill rows better and take longer to deal."""


class DataConfig(Section):
    """Either captions from webdataset tars (pretraining) or conversations from annotation files (fine-tuning)."""

    kind: Literal["captions", "conversations"]
    """captions for pretraining, conversations for fine-tuning."""
    root: FilePath
    """Folder that holds the annotation files and images of every source; relative shard patterns start here too."""
    captions: Annotated[tuple[CaptionsConfig, ...], BeforeValidator(_tuple)] = ()
    """For kind captions."""
    sources: Annotated[tuple[SourceConfig, ...], BeforeValidator(_tuple)] = ()
    """For kind conversations."""
    mixing: Literal["weights", "uniform", "proportional"] = "weights"
    """weights: the sources' own (Table 4); uniform: every source as often; proportional: by number of samples, so that every
    sample is as likely (the papers' "uniform over samples")."""
    phases: Annotated[tuple[PhaseConfig, ...], BeforeValidator(_tuple)] = ()
    """In sequence; empty: one phase with all sources, image first."""
    packing: PackingConfig = PackingConfig()
    """Fixed rows of several samples."""
    tokenizer: FilePath
    """Hugging Face tokenizer folder of the family model.decoder.family, as published or with AKI's tokens."""
    system_message: str = SYSTEM_MESSAGE
    """Opens every conversation."""
    max_text_tokens: PositiveInt
    """Longest text in tokens, markers included, image places not (papers, Table 3: 128 and 512)."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of unreadable samples past which the run stops."""
    num_workers: NonNegativeInt = 4
    """Background processes that decode pictures for one rank; 0: a thread of the rank itself."""
    prefetch_steps: PositiveInt = 2
    """Optimizer steps of batches prepared ahead in the background."""
    shards_per_block: PositiveInt = 16
    """Captions: tars whose samples are shuffled together; more shuffle better and open more files at a time."""
    cache: FilePath | None = None
    """Folder for tars that ``pipe:`` shards fetch, and for the indices of tars that lie in a folder without write
    access; empty: below the user's cache folder."""
    cache_gigabytes: PositiveFloat = 100.0
    """Most that fetched tars may occupy; the least recently used goes first."""
