"""Text to token ids: the only door to transformers' tokenizers.

The release of AKI trains with Phi-3's *slow* tokenizer (transformers 4.41.2, ``legacy=False``), which puts no
space before text that follows a special token. Phi-3's published ``tokenizer.json`` does put one there, so the
fast tokenizer is stripped of that rule; then both give the same ids (proved in tests/data/test_data_text.py).
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aki_megatron.config.model import DecoderConfig
from aki_megatron.data.chat import ENDOFCHUNK, IMAGE, PAD, Chat
from aki_megatron.errors import ConfigError, DataError

_SPACE = "\u2581"
"""What sentencepiece writes for a space."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""What it writes for a byte that is no character of the vocabulary."""


class Tokenizer:
    """A Hugging Face fast tokenizer folder of one family. Every id is looked up by name.

    chat  how the family writes conversations; the folder must hold its markers

    AKI's tokens are added where they are missing, as ``grow_tokenizer`` does. Attributes ``eos pad image endofchunk``
    and ``close final`` (of ``chat``) are token ids; ``stops`` are those that end what is generated; ``size`` is the
    number of tokens.
    Errors: DataError where the folder is missing, has no fast tokenizer, or lacks a marker.
    """

    def __init__(self, folder: Path, chat: Chat) -> None:
        self.folder, self.chat = folder, chat
        loaded = _open(folder)
        _add_tokens(loaded, folder)
        rules = _stripped(json.loads(loaded.backend_tokenizer.to_str()))
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(rules))
        special = self._backend.get_added_tokens_decoder()
        self._special = {i: token.content for i, token in special.items()}
        self._swallowing = {i: token.content for i, token in special.items() if token.rstrip}
        if missing := [name for name in chat.markers if name not in self._special.values()]:
            raise DataError(
                f"Tokenizer {folder} lacks the special tokens {', '.join(missing)}; it needs "
                f"{', '.join(chat.markers)}. Point data.tokenizer to a folder of the family model.decoder.family."
            )
        self.eos, self.pad = int(loaded.eos_token_id), int(loaded.pad_token_id)
        self.image, self.endofchunk = self.id(IMAGE), self.id(ENDOFCHUNK)
        self.close, self.final = self.id(chat.close), self.id(chat.final)
        self.stops = frozenset({self.eos, *map(self.id, chat.stops)})
        self.size = self._backend.get_vocab_size(with_added_tokens=True)
        names = sorted(self._special.values(), key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, names)))
        self._bytes = _byte_letters() if '"ByteLevel"' in json.dumps(rules["decoder"]) else None

    def id(self, name: str) -> int:
        """The id of one token by its exact name; DataError if there is none."""
        found = self._backend.token_to_id(name)
        if found is None:
            raise DataError(f"Tokenizer {self.folder} has no token {name!r}.")
        return found

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Token ids of the text as it stands (nothing added), where it follows the token ``after``.

        Special tokens written in the text become their ids. No token begins before the text; but a special token there
        may swallow the white space at its beginning, as Phi-3's do.
        """
        before = self._swallowing.get(after, "") if after is not None else ""
        ids = self._backend.encode(before + text, add_special_tokens=False).ids
        return ids[1:] if before else ids

    def decode(self, ids: list[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def token(self, token_id: int) -> str:
        """The name of one id as the vocabulary writes it (sentencepiece writes U+2581 for a space)."""
        name = self._backend.id_to_token(token_id)
        if name is None:
            raise DataError(f"Tokenizer {self.folder} has {self.size} tokens; there is no id {token_id}.")
        return name

    def spelling(self, token_id: int) -> bytes:
        """What one token stands for, in UTF-8; it may be a part of a character. A special token stands for its name."""
        name = self.token(token_id)
        if self.is_special(token_id):
            return name.encode()
        if self._bytes is not None:
            return bytes(self._bytes[letter] for letter in name)
        byte = _BYTE.fullmatch(name)
        return bytes.fromhex(byte[1]) if byte else name.replace(_SPACE, " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Whether it is a token that text is cut at, a marker for example."""
        return token_id in self._special

    def find_special(self, text: str) -> str | None:
        """The first special token that is written out in the text, or None."""
        found = self._any_special.search(text)
        return found.group() if found else None

    def check_vocabulary(self, config: DecoderConfig) -> None:
        """ConfigError unless the model's tables have exactly this tokenizer's tokens."""
        cure = f"set vocab_size={self.image} and num_added_tokens={self.size - self.image}."
        if config.total_vocab_size != self.size:
            raise ConfigError(
                f"model.decoder.vocab_size + num_added_tokens = {config.vocab_size} + {config.num_added_tokens} = "
                f"{config.total_vocab_size}, but the tokenizer {self.folder} has {self.size} tokens; {cure}"
            )
        if config.num_added_tokens and config.vocab_size != self.image:
            raise ConfigError(
                f"model.decoder.vocab_size={config.vocab_size}, but the extra rows start at {IMAGE}, whose id "
                f"in {self.folder} is {self.image}; {cure}"
            )
        if config.padded_vocab_size < config.vocab_size:
            raise ConfigError(
                f"model.decoder.padded_vocab_size={config.padded_vocab_size} rows cannot hold "
                f"vocab_size={config.vocab_size} tokens; set padded_vocab_size to {config.vocab_size} or more."
            )


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of a tokenizer that was grown for AKI, and the sizes that the decoder needs for them."""

    vocab_size: int
    """Ids below it are rows of the language model's tables; ``image`` is the first that is not."""
    num_added_tokens: int
    bos: int | None
    eos: int
    pad: int
    image: int
    endofchunk: int


def grow_tokenizer(source: Path, out: Path) -> Vocabulary:
    """Add AKI's tokens to the tokenizer of a language model's folder and write it to ``out``.

    ``<pad>`` is added only where the tokenizer has no padding token or pads with its end-of-text token, as the release
    does; then ``<image>`` and ``<|endofchunk|>``. What is written gives the ids of Tokenizer, also to those who read it
    with transformers alone. A tokenizer that was grown before stays as it is.

    Errors: DataError where the folder has no fast tokenizer or no end-of-text token, or where the added tokens would
    not be its last ones.
    """
    loaded = _open(source)
    _add_tokens(loaded, source)
    size, ids = len(loaded), loaded.get_vocab()
    image, endofchunk = ids[IMAGE], ids[ENDOFCHUNK]
    if (image, endofchunk) != (size - 2, size - 1):
        raise DataError(
            f"Tokenizer {source} has {size} tokens; {IMAGE} and {ENDOFCHUNK} must be the last two, and are {image} and "
            f"{endofchunk}. Give the tokenizer of the language model as it was published."
        )
    _ids_of_training(loaded).save_pretrained(str(out))
    return Vocabulary(
        vocab_size=image,
        num_added_tokens=2,
        bos=loaded.bos_token_id,
        eos=loaded.eos_token_id,
        pad=loaded.pad_token_id,
        image=image,
        endofchunk=endofchunk,
    )


def _add_tokens(loaded: PreTrainedTokenizerFast, folder: Path) -> None:
    """Add AKI's tokens where they are missing: <pad> only where nothing else than the end of text would pad."""
    if loaded.eos_token_id is None:
        raise DataError(f"Tokenizer {folder} names no end-of-text token (eos_token in tokenizer_config.json); name it.")
    needs_pad = loaded.pad_token_id in (None, loaded.eos_token_id)
    names = (PAD, IMAGE, ENDOFCHUNK) if needs_pad else (IMAGE, ENDOFCHUNK)
    # without strip flags: the newline after <image> stays and is tokenized, as in the release
    added = [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]
    loaded.add_tokens(added, special_tokens=True)
    if needs_pad:
        loaded.pad_token = PAD


def _ids_of_training(loaded: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer without a space before text that follows a special token; itself where it puts none."""
    rules = json.loads(loaded.backend_tokenizer.to_str())
    stripped = _stripped(rules)
    if stripped == rules:
        return loaded
    # classes of families put the rule back whenever they are loaded; this one takes tokenizer.json as it is
    kept = {name: str(token) for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(stripped)),
        model_max_length=loaded.model_max_length,
        chat_template=loaded.chat_template,
        clean_up_tokenization_spaces=False,
        **kept,
    )


def _open(folder: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a local folder as transformers gives it."""
    if not folder.is_dir():
        raise DataError(f"Tokenizer folder {folder} does not exist (data.tokenizer).")
    if not (folder / "tokenizer.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(
            f"Tokenizer folder {folder} has no tokenizer.json (found: {found}). A fast tokenizer is needed; "
            "save it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    try:
        # False: a folder that brings code (one that to-hf wrote) would have transformers ask whether to run it
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exception for malformed JSON; the cause is kept
        raise DataError(f"Tokenizer folder {folder} cannot be read: {error}") from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise DataError(f"Tokenizer folder {folder} gives {type(loaded).__name__}, which is not a fast tokenizer.")
    return loaded


def _stripped(rules: dict[str, Any]) -> dict[str, Any]:
    """Rules as in tokenizer.json, without a space before text, without truncation and padding."""
    normalizer, pre_tokenizer = _without_prefix(rules["normalizer"]), _without_prefix(rules["pre_tokenizer"])
    return {**rules, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "truncation": None, "padding": None}


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


def _byte_letters() -> dict[str, int]:
    """How byte-level vocabularies write bytes: as the letter with that number if it prints, else U+0100 and on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
