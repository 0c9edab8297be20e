"""Which datasets a run reads, how they are mixed and ordered, and how samples are packed into sequences."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from aki_megatron.config.datasets import (
    CAPTION_FORMATS,
    DATASET_FORMAT,
    OCR_GRANULARITIES,
    OFFICIAL_INDEX,
    OWN_FORMATS,
)
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
    SourceFormat = str
    CaptionFormat = str
    Granularity = str
else:  # the registry is the one list of names; type checkers do not evaluate it
    SourceFormat = Literal[(DATASET_FORMAT, *OWN_FORMATS)]
    CaptionFormat = Literal[CAPTION_FORMATS]
    Granularity = Literal[(*OCR_GRANULARITIES, OFFICIAL_INDEX)]


def _one_or_many(value: Any) -> Any:
    """Return a text as a list of one: a validator before that of a list of texts."""
    return (value,) if isinstance(value, str) else as_tuple(value)


class ColumnsConfig(Section):
    """Names of the columns of a table, or of the keys of a record, in files of one's own; empty: the usual names."""

    messages: str = ""
    """List of messages. Usual: conversations (format llava), messages (format messages), and in parquet one of
    messages, conversations, texts."""
    images: str = ""
    """Image of a record, or a list of them. Usual: images or image."""
    id: str = ""
    """What messages and the sample audit log call a record, beside its line or row. Usual: id."""
    role: str = ""
    """Who speaks, in a message. Usual: from (llava), role (messages), either in parquet."""
    content: str = ""
    """What is said, in a message. Usual: value (llava), content (messages), either in parquet."""


class SourceConfig(Section):
    """One fine-tuning dataset, or conversations in files of one's own, and its weight in the mixture."""

    name: str
    """One of the public datasets, which decides the reader; with another format a name of one's own, for phases,
    messages and the sample audit log."""
    weight: Weight = 1.0
    """Sampling weight, relative: the weights of a run are normalized (papers, Table 4). Used where data.mixing is
    weights."""
    augment: Literal["none", "official"] = "none"
    """official: the random crop and flip of the released code, which mirror text and leave bounding boxes unchanged;
    for comparison only."""
    split_turns: bool = True
    """true makes a sample of each question and answer of a conversation, without what was said before; false keeps
    whole conversations. Default: true for llava150k, as in the papers, false for files of one's own."""
    format: SourceFormat = DATASET_FORMAT
    """dataset: the public dataset of this name. Files of one's own: llava (JSON or JSONL of conversations with
    <image>), messages (JSON or JSONL of OpenAI's messages), parquet (tables as Hugging Face datasets store them)."""
    path: Annotated[tuple[str, ...], BeforeValidator(_one_or_many)] = ()
    """Own files, below data.root: a file, a folder, a pattern whose braces expand (part-{00000..00007}.parquet), or a
    list of them."""
    images: str = ""
    """Folder below data.root that the paths of images start at, which may not lead out of it; empty: data.root."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of keys and columns in own files, where they are not the usual ones."""

    @model_validator(mode="before")
    @classmethod
    def _keep_own_conversations_whole(cls, values: Any) -> Any:
        if isinstance(values, dict) and "split_turns" not in values and values.get("format") in OWN_FORMATS:
            return {**values, "split_turns": False}
        return values


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
    """For data.kind conversations: datasets by name, and files of one's own, as in {name: mine, format: llava, path:
    chat.jsonl, images: pictures}; docs/own_data.md."""
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
    """Tars of captions, or row groups of parquet, whose samples are shuffled together; more shuffle better and open
    more files at a time."""
    cache: FilePath | None = None
    """Folder for tars that commands and URLs fetch, and for the indices of tars in folders without write access; null:
    a folder below the user's cache folder."""
    cache_gigabytes: Gigabytes = 100.0
    """Largest size of all fetched tars together, in gigabytes; the least recently used are deleted first."""
