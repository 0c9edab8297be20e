"""What a decoder family is: its traits, its config.json keys, its weight names, its chat format, its reference layers.

All families are pre-norm decoders with RMSNorm, rotary positions and SwiGLU. A Family holds everything in which one
differs from another; families/registry.py lists them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Template
from typing import Any

PAD_TOKEN = "<pad>"
IMAGE_TOKEN = "<image>"
ENDOFCHUNK_TOKEN = "<|endofchunk|>"
"""Tokens that AKI adds to a tokenizer, in this order (Phi-3.5: ids 32011, 32012, 32013)."""

ROLES = ("system", "user", "assistant")

_CHAT_TEMPLATE = (
    "{%- macro message(role, text) -%}{{- '$before_role' + role + '$after_role' + text + '$turn_end' -}}"
    "{%- endmacro -%}"
    "{{- '$conversation_start' -}}"
    "{%- if messages[0]['role'] != 'system' and '$system_message' -%}"
    "{{- message('system', '$system_message') -}}{%- endif -%}"
    "{%- for each in messages -%}"
    "{%- if each['content'] is string -%}{{- message(each['role'], each['content']) -}}{%- else -%}"
    "{%- set found = namespace(all='', text='', leading=0, later=0) -%}"
    "{%- for part in each['content'] -%}"
    "{%- if part['type'] != 'image' -%}"
    "{%- set found.text = found.text + part['text'] -%}{%- set found.all = found.all + part['text'] -%}"
    "{%- else -%}"
    "{%- if found.text -%}{%- set found.later = found.later + 1 -%}"
    "{%- else -%}{%- set found.leading = found.leading + 1 -%}{%- endif -%}"
    "{%- set found.all = found.all + '$image' -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if found.leading and not found.later and found.text and not found.text[0].isspace() -%}"
    "{%- set found.all = '$image\n' * found.leading + found.text -%}{%- endif -%}"
    "{{- message(each['role'], found.all) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '$response_start' -}}{%- endif -%}"
)
"""Jinja, filled in by ChatFormat.chat_template. The parts of a message are written as they are, as training reads the
prompts of users' own files; but images before a text that does not begin with white space are followed by a newline
each, as in AKI's own format."""


STANDARD_CONFIG_KEYS: Mapping[str, str] = {
    "family": "model_type",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "padded_vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Field of model.decoder -> key of config.json, in most families."""


@dataclass(frozen=True)
class FamilyTraits:
    """Parameters of the attention that only some families have."""

    qkv_bias: bool
    """Queries, keys and values have a bias; the output projection has none."""
    qk_norm: bool
    """Queries and keys pass an RMSNorm over the head dimension before the rotary embedding."""


@dataclass(frozen=True, kw_only=True)
class HFConfigKeys:
    """The family's config.json."""

    architecture: str
    """Class name in ``architectures``."""
    defaults: Mapping[str, Any]
    """Values that transformers takes for keys that config.json omits."""
    field_keys: Mapping[str, str] = field(default_factory=lambda: STANDARD_CONFIG_KEYS)
    """Field of model.decoder -> key of config.json."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must have this value where config.json has them; exported folders have them."""
    rope_types: tuple[str, ...] = ("default",)
    """Values of model.decoder.rope.rope_type that the family knows."""
    rope_type_aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spellings in published folders -> rope_type."""
    sliding_window_switch: str | None = "use_sliding_window"
    """Key that turns ``sliding_window`` on for layers from ``max_window_layers`` on; None: always on, in all layers."""


@dataclass(frozen=True, init=False)
class WeightRule:
    """A tensor of our model and its external names: one, or several that we hold fused along axis 0, in this order."""

    native: str
    external: tuple[str, ...]

    def __init__(self, native: str, *external: str) -> None:
        object.__setattr__(self, "native", native)
        object.__setattr__(self, "external", external)


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """Tensor names of the family's Hugging Face folders; the defaults are those of most families."""

    layer_rules: tuple[WeightRule, ...]
    """Tensors of one decoder layer: our name within the layer, the external names after ``layer_prefix``."""
    base_model_prefix: str = "model."
    """Prefix of all tensors but the LM head's."""
    layer_prefix: str = "layers.{i}."
    """Prefix of layer i, after ``base_model_prefix``."""
    embedding: str = "embed_tokens.weight"
    """Token embedding, after ``base_model_prefix``."""
    final_norm: str = "norm.weight"
    """RMSNorm after the last layer, after ``base_model_prefix``."""
    lm_head: str = "lm_head.weight"
    """Whole name; absent from folders with tied embeddings."""


@dataclass(frozen=True)
class Licence:
    """A licence as model cards on the Hugging Face Hub name it."""

    id: str
    """Identifier of the Hub; ``other`` where it has none."""
    name: str = ""
    """Name of an ``other`` licence."""
    link: str = ""
    """Its text, of an ``other`` licence."""


@dataclass(frozen=True)
class PublishedModel:
    """A published language model, recognized by its sizes."""

    hub_id: str
    hidden_size: int
    num_layers: int
    licence: Licence


@dataclass(frozen=True, kw_only=True)
class ReferenceClasses:
    """Dotted paths of the transformers classes that conversions are checked against (checkpoint/hf_reference.py)."""

    config: str
    layer: str
    norm: str
    rotary: str


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How conversations and captions are written as text. Training, evaluation and exported folders all follow it.

    A conversation is ``conversation_start``, then for each message the header of its role, its text, ``turn_end`` and
    ``turn_separator``. A caption is ``caption_start``, the image, the text, ``<|endofchunk|>`` and ``sample_end``.
    Where the tokenizer strips white space after a special token (Phi-3's does), a newline written here is no token;
    elsewhere it is one, and belongs to the prompt.
    """

    conversation_start: str
    header_format: str
    """Header of a message, with ``{role}`` for one of ROLES."""
    turn_end: str
    """Token that ends a message; supervised at the end of a response."""
    turn_separator: str
    caption_start: str
    sample_end: str
    """Token that ends a sample, in place of the last response's ``turn_end``."""
    stop_tokens: tuple[str, ...]
    """Tokens that end generation, besides the tokenizer's own end of text."""

    def header(self, role: str) -> str:
        """Return the header of a message of this role."""
        return self.header_format.format(role=role)

    @property
    def response_start(self) -> str:
        """Text after which a response begins."""
        return self.header("assistant")

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens that a tokenizer of the family must have, without duplicates."""
        texts = (self.conversation_start, *map(self.header, ROLES), self.turn_end, self.caption_start, self.sample_end)
        return tuple(dict.fromkeys(re.findall(r"<[^<>]+>", "".join((*texts, *self.stop_tokens)))))

    def chat_template(self, system_message: str) -> str:
        """Return transformers' chat template (Jinja) that writes the same text.

        system_message  starts a conversation that has no system message of its own; empty: no system block
        """
        before_role, after_role = self.header_format.split("{role}")
        written = Template(_CHAT_TEMPLATE).substitute(
            conversation_start=self.conversation_start,
            before_role=before_role,
            after_role=after_role,
            turn_end=self.turn_end + self.turn_separator,
            system_message=system_message.replace("\\", "\\\\").replace("'", "\\'").replace("\r", "\\r"),
            image=IMAGE_TOKEN,
            response_start=self.response_start,
        )
        return written.replace("\n", "\\n")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder family. Its name in the registry is the model_type of its config.json."""

    traits: FamilyTraits
    config: HFConfigKeys
    weights: WeightNames
    chat: ChatFormat
    reference: ReferenceClasses
    published: tuple[PublishedModel, ...] = ()
    """Models that an exported folder's model card names, with the licence that their weights pass on."""

    def published_model(self, hidden_size: int, num_layers: int) -> PublishedModel | None:
        """Return the published model of these sizes, if there is one."""
        sizes = (hidden_size, num_layers)
        return next((model for model in self.published if (model.hidden_size, model.num_layers) == sizes), None)
