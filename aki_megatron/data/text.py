"""Text to token ids: the only door to transformers' tokenizers.

The release of AKI trains with Phi-3's *slow* tokenizer (transformers 4.41.2, ``legacy=False``), which puts no
space before text that follows a special token. Phi-3's published ``tokenizer.json`` does put one there, so the
fast tokenizer is stripped of that rule; then both give the same ids (proved in tests/data/test_data_text.py).
"""

import json
import re
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from aki_megatron.config.model import DecoderConfig
from aki_megatron.flow import ConfigError, DataError

BOS = "<s>"
EOS = "<|endoftext|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
END = "<|end|>"
ASSISTANT = "<|assistant|>"
PAD = "<pad>"
IMAGE = "<image>"
ENDOFCHUNK = "<|endofchunk|>"

REQUIRED = (BOS, EOS, SYSTEM, USER, END, ASSISTANT)
"""Special tokens the folder must hold."""

ADDED = (PAD, IMAGE, ENDOFCHUNK)
"""Tokens added in this order where missing (Phi-3.5: ids 32011, 32012, 32013, as in AKI's release)."""


class Tokenizer:
    """A Hugging Face fast tokenizer folder of the Phi-3 family. Every id is looked up by name.

    Attributes ``bos eos pad image endofchunk assistant end`` are token ids; ``size`` is the number of tokens.
    Raises DataError where the folder is missing, has no fast tokenizer, or lacks a special token.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._backend = _load(folder)
        missing = [name for name in REQUIRED if self._backend.token_to_id(name) is None]
        if missing:
            raise DataError(
                f"Tokenizer {folder} lacks the special tokens {', '.join(missing)}; it needs {', '.join(REQUIRED)}. "
                "Point data.tokenizer to a folder of the Phi-3 family."
            )
        # without strip flags: the newline after <image> stays and is tokenized, as in the release
        self._backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in ADDED])
        self.bos, self.eos, self.end = self.id(BOS), self.id(EOS), self.id(END)
        self.assistant = self.id(ASSISTANT)
        self.pad, self.image, self.endofchunk = self.id(PAD), self.id(IMAGE), self.id(ENDOFCHUNK)
        self.size = self._backend.get_vocab_size(with_added_tokens=True)
        names = sorted((token.content for token in self._backend.get_added_tokens_decoder().values()), key=len)
        self._special = re.compile("|".join(re.escape(name) for name in reversed(names)))

    def id(self, name: str) -> int:
        """The id of one token by its exact name; DataError if there is none."""
        found = self._backend.token_to_id(name)
        if found is None:
            raise DataError(f"Tokenizer {self.folder} has no token {name!r}.")
        return found

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of the text as it stands (nothing added), and the character at which each token starts.

        Special tokens written in the text become their ids. The starts never decrease; the bytes of one
        character outside the vocabulary share one start.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The name of one id as the vocabulary writes it (a space is U+2581)."""
        name = self._backend.id_to_token(token_id)
        if name is None:
            raise DataError(f"Tokenizer {self.folder} has {self.size} tokens; there is no id {token_id}.")
        return name

    def find_special(self, text: str) -> str | None:
        """The first special token that is written out in the text, or None."""
        found = self._special.search(text) if "<" in text else None
        return found.group() if found else None

    def check_vocabulary(self, config: DecoderConfig) -> None:
        """ConfigError unless the model's tables have exactly this tokenizer's tokens."""
        cure = f"set base_tokens={self.image} and extra_tokens={self.size - self.image}."
        if config.num_tokens != self.size:
            raise ConfigError(
                f"model.decoder.base_tokens + extra_tokens = {config.base_tokens} + {config.extra_tokens} = "
                f"{config.num_tokens}, but the tokenizer {self.folder} has {self.size} tokens; {cure}"
            )
        if config.extra_tokens and config.base_tokens != self.image:
            raise ConfigError(
                f"model.decoder.base_tokens={config.base_tokens}, but the extra rows start at {IMAGE}, whose id "
                f"in {self.folder} is {self.image}; {cure}"
            )
        if config.vocab_rows < config.base_tokens:
            raise ConfigError(
                f"model.decoder.vocab_rows={config.vocab_rows} rows cannot hold "
                f"base_tokens={config.base_tokens} tokens; set vocab_rows to {config.base_tokens} or more."
            )


def _load(folder: Path) -> tokenizers.Tokenizer:
    """The fast tokenizer of a local folder, without a space before text that follows a special token."""
    if not folder.is_dir():
        raise DataError(f"Tokenizer folder {folder} does not exist (data.tokenizer).")
    if not (folder / "tokenizer.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(
            f"Tokenizer folder {folder} has no tokenizer.json (found: {found}). A fast tokenizer is needed; "
            "save it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises bare Exception for malformed JSON; the cause is kept
        raise DataError(f"Tokenizer folder {folder} cannot be read: {error}") from error
    if not getattr(loaded, "is_fast", False):
        raise DataError(f"Tokenizer folder {folder} gives {type(loaded).__name__}, which is not a fast tokenizer.")
    rules = json.loads(loaded.backend_tokenizer.to_str())
    rules["normalizer"] = _without_prefix(rules["normalizer"])
    rules["pre_tokenizer"] = _without_prefix(rules["pre_tokenizer"])
    rules["truncation"] = rules["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(rules))


def _without_prefix(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer as in tokenizer.json, without the part that puts a space before a segment."""
    if rule is None or rule["type"] == "Prepend":
        return None
    if rule["type"] == "Metaspace":
        return {**rule, "prepend_scheme": "never"}
    for parts in ("normalizers", "pretokenizers"):
        if parts in rule:
            kept = [part for part in map(_without_prefix, rule[parts]) if part is not None]
            return {**rule, parts: kept}
    return rule
