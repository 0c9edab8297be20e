"""How each family writes conversations and captions: the one table that training, evaluation and export go by.

The markers are those of the published chat templates of these instruction models; what is written between them is the
papers'. So three things that the templates write are left out: LLaMA's lines of dates before the system message,
Qwen2.5's system message of its own, and Qwen3's empty thinking block before the last answer.

    phi3    Phi-3.5-mini-instruct, as AKI's release writes it
    llama   LLaMA-3.2-3B-Instruct
    qwen2   Qwen2.5-3B-Instruct
    qwen3   Qwen3-1.7B, Qwen3-8B
"""

import re
from dataclasses import dataclass

from aki_megatron.config.data import SYSTEM_MESSAGE

PAD = "<pad>"
IMAGE = "<image>"
ENDOFCHUNK = "<|endofchunk|>"
"""What AKI adds to a tokenizer, in this order (Phi-3.5: ids 32011, 32012, 32013)."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Chat:
    """A conversation is ``start``, then for every message the header of its role, its text, ``close`` and ``after``."""

    start: str
    header: str
    """With ``{role}``, one of ROLES."""
    close: str
    """The token that ends a message; that of an answer is learnt."""
    after: str
    caption_start: str
    """A caption is this, the image, the text, ``<|endofchunk|>`` and ``final``."""
    final: str
    """The token that ends a sample; it takes the place of the last answer's ``close``."""
    stops: tuple[str, ...]
    """Tokens that end what is generated, besides the tokenizer's own end of text."""

    def opening(self, role: str) -> str:
        """The header of a role."""
        return self.header.format(role=role)

    @property
    def answer_start(self) -> str:
        """What an answer begins after."""
        return self.opening("assistant")

    @property
    def markers(self) -> tuple[str, ...]:
        """The special tokens that a tokenizer of the family holds, each once."""
        written = (self.start, *map(self.opening, ROLES), self.close, self.caption_start, self.final, *self.stops)
        return tuple(dict.fromkeys(re.findall(r"<[^<>]+>", "".join(written))))

    def template(self) -> str:
        """The same as transformers' chat template (Jinja). Without a system message the papers' one opens the text."""
        header = self.header.replace("{role}", "' + role + '")
        lines = [
            "{%- macro message(role, text) -%}{{- '" + header + "' + text + '" + self.close + self.after + "' -}}",
            "{%- endmacro -%}",
            "{{- '" + self.start + "' -}}",
            "{%- if messages[0]['role'] != 'system' -%}{{- message('system', '"
            + SYSTEM_MESSAGE.replace("'", "\\'")
            + "') -}}",
            "{%- endif -%}",
            "{%- for each in messages -%}{%- set parts = namespace(texts=[]) -%}",
            "{%- if each['content'] is string -%}{%- set parts.texts = [each['content']] -%}{%- else -%}",
            "{%- for part in each['content'] -%}",
            "{%- set parts.texts = parts.texts + ['" + IMAGE + "' if part['type'] == 'image' else part['text']] -%}",
            "{%- endfor -%}{%- endif -%}",
            "{{- message(each['role'], parts.texts | join('\n')) -}}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- '" + self.answer_start + "' -}}{%- endif -%}",
        ]
        return "".join(lines).replace("\n", "\\n")


_CHATML = Chat(
    start="",
    header="<|im_start|>{role}\n",
    close="<|im_end|>",
    after="\n",
    caption_start="",  # these tokenizers have no token that begins a text
    final="<|im_end|>",
    stops=("<|im_end|>", "<|endoftext|>"),
)

CHATS = {
    "phi3": Chat(
        start="<s> ",  # the lone space is a token: the release's slow tokenizer puts it before <|system|>
        header="<|{role}|>\n",
        close="<|end|>",
        after="\n",
        caption_start="<s>",
        final="<|endoftext|>",  # as the release; the others end every answer alike, as they were instructed
        stops=("<|endoftext|>", "<|end|>", "<|assistant|>"),
    ),
    "llama": Chat(
        start="<|begin_of_text|>",
        header="<|start_header_id|>{role}<|end_header_id|>\n\n",
        close="<|eot_id|>",
        after="",
        caption_start="<|begin_of_text|>",
        final="<|eot_id|>",
        stops=("<|eot_id|>", "<|end_of_text|>"),
    ),
    "qwen2": _CHATML,
    "qwen3": _CHATML,
}
"""Families by the name in config/model.py. Where a marker swallows the white space after it (Phi-3's do), a newline
that is written here is no token; elsewhere it is one, and belongs to the prompt."""
