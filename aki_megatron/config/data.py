"""Which datasets a run reads, how they are mixed and ordered, and how samples are packed into sequences."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from aki_megatron.config.datasets import CAPTION_FORMATS, DATASETS, DRAWN_DATASETS, OCR_GRANULARITIES, OFFICIAL_INDEX
from aki_megatron.config.section import (
    AtMost,
    FilePath,
    Floats,
    Gigabytes,
    NonNegativeInt,
    PositiveInt,
    Section,
    Strings,
    Weight,
    as_tuple,
)
from aki_megatron.config.trainable import PhaseTrainable

SYSTEM_MESSAGE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""The papers' system message (AKI, Table 5)."""

if TYPE_CHECKING:
    SourceName = str
    CaptionFormat = str
    Granularity = str
else:  # the registry is the one list of names; type checkers do not evaluate it
    SourceName = Literal[(*DATASETS, *DRAWN_DATASETS)]
    CaptionFormat = Literal[CAPTION_FORMATS]
    Granularity = Literal[(*OCR_GRANULARITIES, OFFICIAL_INDEX)]


class SourceConfig(Section):
    """One fine-tuning dataset and its weight in the mixture."""

    name: SourceName
    """Dataset, which decides the reader."""
    weight: Weight = 1.0
    """Sampling weight, relative: the weights of a run are normalized (papers, Table 4). Used where data.mixing is
    weights."""
    augment: Literal["none", "official"] = "none"
    """official: the random crop and flip of the released code, which mirror text and leave bounding boxes unchanged;
    for comparison only."""
    split_turns: bool = True
    """llava150k: true makes a sample of each question and answer, as the papers do; false keeps whole conversations."""


class CaptionsConfig(Section):
    """One set of webdataset tars and its weight in the mixture."""

    name: str
    """Name of the set, for phases, error messages and the sample audit log."""
    shards: Strings
    """Tars of (jpg | png | webp ..., txt) pairs; braces expand: captions/{00000..00007}.tar. pipe:COMMAND fetches a tar
    by running a command that writes it to its standard output; a URL (https://...) is opened as webdataset does."""
    skip_missing: bool = False
    """Leave out tars that do not exist, as a download leaves gaps in {00000..31000}; a start says how many. false: they
    are an error."""
    format: CaptionFormat = "caption"
    """Content of a txt member. caption: the caption itself (BLIP3-KALE, CC3M, CC12M). blip3_ocr: the JSON list of
    BLIP3-OCR-200M."""
    granularity: Granularity = "basic text"
    """blip3_ocr: which description of the JSON list to train on; official index: the second, as the released code
    does."""
    weight: Weight = 1.0
    """Sampling weight, relative: the weights of a run are normalized. Used where data.mixing is weights."""


class ImagesConfig(Section):
    """How images become the pixels of the encoder; the defaults are what the released code does."""

    transparency: Literal["ignore", "white"] = "ignore"
    """ignore: take the colors stored under transparent pixels, often black, as the released code does. white: lay the
    image on white, so that black text on a transparent ground stays readable."""
    exif_rotation: bool = False
    """Turn photographs as their EXIF orientation says; the released code does not, and trains them as they are
    stored."""


OFFICIAL_IMAGES = ImagesConfig()
"""What the released code does."""


class PhaseConfig(Section):
    """A number of optimizer steps with a choice of sources and an order of image and text."""

    steps: PositiveInt
    """Optimizer steps of the phase; the phases of a run add up to train.steps."""
    sources: Strings = ()
    """Names of the sources to sample from; empty: all. A source that an earlier phase read goes on where that phase
    stopped (docs/data.md)."""
    order: Literal["image_first", "text_first"] = "image_first"
    """text_first puts the question (or caption) before the image: dual-order training (papers, section 3.2)."""
    trainable: PhaseTrainable = PhaseTrainable()
    """Parts of the model that train otherwise than the section trainable says, for example {decoder: frozen}."""


class PackingConfig(Section):
    """Several samples per sequence, each a segment of its own, to avoid padding."""

    enabled: bool = False
    """Pack samples. train.global_batch_size and train.micro_batch_size then count packed sequences."""
    sequence_length: Annotated[PositiveInt, AtMost(2**24)] = 4096
    """Length of a packed sequence in positions: text tokens and image latents."""
    max_images: Annotated[PositiveInt, AtMost(2**20)] = 32
    """Largest number of images (and other media) in a packed sequence."""
    buffer_size: Annotated[PositiveInt, AtMost(2**24)] = 4096
    """Samples that are packed at a time: more leave less padding and take longer to pack."""


class DataConfig(Section):
    """Training data: captions from webdataset tars, or conversations from annotation files and images."""

    kind: Literal["captions", "conversations"]
    """captions for pretraining, conversations for fine-tuning."""
    root: FilePath
    """Folder of the annotation files and images of every source; relative shard patterns start here too."""
    captions: Annotated[tuple[CaptionsConfig, ...], BeforeValidator(as_tuple)] = ()
    """Caption sets, for data.kind captions."""
    sources: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_tuple)] = ()
    """Datasets, for data.kind conversations."""
    mixing: Literal["weights", "uniform", "proportional"] = "weights"
    """Sampling of sources. weights: by the weight of each (papers, Table 4). uniform: every source equally often.
    proportional: by number of samples, so that every sample is equally likely (the papers' "uniform over samples")."""
    phases: Annotated[tuple[PhaseConfig, ...], BeforeValidator(as_tuple)] = ()
    """Phases in sequence; empty: one phase with all sources, image first."""
    images: ImagesConfig = ImagesConfig()
    """Transparency and rotation of images."""
    packing: PackingConfig = PackingConfig()
    """Packed sequences of several samples."""
    tokenizer: FilePath
    """Hugging Face tokenizer folder of the family model.decoder.family, as published or with AKI's added tokens."""
    system_message: str = SYSTEM_MESSAGE
    """System message of every conversation."""
    caption_prefix: Floats = ()
    """Captions: [low, high], fractions from 0 to below 1. Of every caption a first part, of a fraction drawn anew for
    every sample, is prompt: not learnt, and visible to the image, so that attention.rule mma trains on captions without
    a leak. Empty: the whole caption is learnt."""
    max_text_tokens: Annotated[PositiveInt, AtMost(2**24)]
    """Longest text of a sample in tokens, chat markers included, image latents not (papers, Table 3: 128 and 512)."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Largest fraction of unreadable samples among all that are asked for; above it the run stops."""
    num_workers: Annotated[NonNegativeInt, AtMost(1024)] = 4
    """Background processes per rank that decode images; 0: a thread of the rank itself."""
    prefetch_steps: Annotated[PositiveInt, AtMost(1024)] = 2
    """Optimizer steps of batches to prepare ahead in the background."""
    shards_per_block: PositiveInt = 16
    """Captions: tars whose samples are shuffled together; more shuffle better and open more files at a time."""
    cache: FilePath | None = None
    """Folder for tars that commands and URLs fetch, and for the indices of tars in folders without write access; null:
    a folder below the user's cache folder."""
    cache_gigabytes: Gigabytes = 100.0
    """Largest size of all fetched tars together, in gigabytes; the least recently used are deleted first."""
