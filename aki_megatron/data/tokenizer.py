"""Convert text to token ids: the only adapter of transformers' tokenizers.

The release of AKI trains with Phi-3's *slow* tokenizer (transformers 4.41.2, ``legacy=False``), which puts no
space before text that follows a special token. Phi-3's published ``tokenizer.json`` does put one there, so that rule is
removed from the fast tokenizer; then both give the same ids (tests/data/test_tokenizer.py).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from aki_megatron.config.model import DecoderConfig
from aki_megatron.data.file_kind import HEAD_BYTES, file_kind
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.families.base import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN, ChatFormat

_SPACE = "\u2581"
"""What sentencepiece writes for a space."""
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""What it writes for a byte that is no character of the vocabulary."""


class Tokenizer:
    """The fast tokenizer in a Hugging Face folder, for one family. Every id is looked up by name.

    chat  how the family writes conversations; the folder must have its special tokens

    AKI's tokens are added where they are missing, as ``grow_tokenizer`` does. ``eos_id pad_id image_id endofchunk_id``
    and ``turn_end_id sample_end_id`` (of ``chat``) are token ids; ``stop_ids`` end generation; ``num_tokens`` is the
    size of the vocabulary, added tokens included.
    Raises DataError where the folder is missing, has no fast tokenizer, or lacks a special token.
    """

    def __init__(self, folder: Path, chat: ChatFormat) -> None:
        self.folder, self.chat = folder, chat
        loaded = open_fast_tokenizer(folder)
        _add_tokens(loaded, folder)
        rules = _without_prefix_rules(json.loads(loaded.backend_tokenizer.to_str()))
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(rules))
        special = self._backend.get_added_tokens_decoder()
        self._special = {i: token.content for i, token in special.items()}
        self._strips_right = {i: token.content for i, token in special.items() if token.rstrip}
        if missing := [name for name in chat.special_tokens if name not in self._special.values()]:
            raise DataError(
                f"Tokenizer {folder} lacks the special tokens {', '.join(missing)}; it needs "
                f"{', '.join(chat.special_tokens)}. Point data.tokenizer to a folder of the family "
                "model.decoder.family."
            )
        self.eos_id, self.pad_id = int(loaded.eos_token_id), int(loaded.pad_token_id)
        self.image_id, self.endofchunk_id = self.token_id(IMAGE_TOKEN), self.token_id(ENDOFCHUNK_TOKEN)
        self.turn_end_id, self.sample_end_id = self.token_id(chat.turn_end), self.token_id(chat.sample_end)
        self.stop_ids = frozenset({self.eos_id, *map(self.token_id, chat.stop_tokens)})
        self.num_tokens = self._backend.get_vocab_size(with_added_tokens=True)
        names = sorted(self._special.values(), key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, names)))
        self._byte_of_letter = _byte_of_letter() if '"ByteLevel"' in json.dumps(rules["decoder"]) else None

    def token_id(self, name: str) -> int:
        """Return the id of a token by its exact name. Raises DataError if there is none."""
        found = self._backend.token_to_id(name)
        if found is None:
            raise DataError(f"Tokenizer {self.folder} has no token {name!r}.")
        return found

    def encode(self, text: str, after: int | None = None) -> list[int]:
        """Return the token ids of ``text`` as it stands (nothing added), where it follows the token ``after``.

        Special tokens written in the text become their ids. No token begins before the text; but a special token there
        may strip the white space at its beginning, as Phi-3's do.
        """
        before = self._strips_right.get(after, "") if after is not None else ""
        ids = self._backend.encode(before + text, add_special_tokens=False).ids
        return ids[1:] if before else ids

    def encode_with_offsets(self, text: str, after: int | None = None) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of ``encode`` and of each token the characters (start, end) of ``text`` that it stands for."""
        before = self._strips_right.get(after, "") if after is not None else ""
        found = self._backend.encode(before + text, add_special_tokens=False)
        offsets = [(max(0, start - len(before)), max(0, end - len(before))) for start, end in found.offsets]
        return (found.ids[1:], offsets[1:]) if before else (found.ids, offsets)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_name(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it (sentencepiece writes U+2581 for a space)."""
        name = self._backend.id_to_token(token_id)
        if name is None:
            raise DataError(f"Tokenizer {self.folder} has {self.num_tokens} tokens; there is no id {token_id}.")
        return name

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token, maybe part of a character; those of its name for a special token."""
        name = self.token_name(token_id)
        if self.is_special(token_id):
            return name.encode()
        if self._byte_of_letter is not None:
            return bytes(self._byte_of_letter[letter] for letter in name)
        byte = _BYTE.fullmatch(name)
        return bytes.fromhex(byte[1]) if byte else name.replace(_SPACE, " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Return whether text is split at this token, as at a chat marker."""
        return token_id in self._special

    def find_special(self, text: str) -> str | None:
        """Return the first special token that is written out in the text, or None."""
        found = self._any_special.search(text)
        return found.group() if found else None

    def check_vocabulary(self, config: DecoderConfig) -> None:
        """Raise ConfigError unless the model's embedding tables have exactly this tokenizer's tokens."""
        cure = f"set vocab_size={self.image_id} and num_added_tokens={self.num_tokens - self.image_id}."
        if config.total_vocab_size != self.num_tokens:
            raise ConfigError(
                f"model.decoder.vocab_size + num_added_tokens = {config.vocab_size} + {config.num_added_tokens} = "
                f"{config.total_vocab_size}, but the tokenizer {self.folder} has {self.num_tokens} tokens; {cure}"
            )
        if config.num_added_tokens and config.vocab_size != self.image_id:
            raise ConfigError(
                f"model.decoder.vocab_size={config.vocab_size}, but the added tokens start at {IMAGE_TOKEN}, whose id "
                f"in {self.folder} is {self.image_id}; {cure}"
            )
        if config.padded_vocab_size < config.vocab_size:
            raise ConfigError(
                f"model.decoder.padded_vocab_size={config.padded_vocab_size} cannot hold "
                f"vocab_size={config.vocab_size} tokens; set padded_vocab_size to {config.vocab_size} or more."
            )


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of a tokenizer that was grown for AKI, and the sizes that the decoder needs for them."""

    vocab_size: int
    """Ids below it are in the language model's own tables; ``image_id`` is the first that is not."""
    num_added_tokens: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    image_id: int
    endofchunk_id: int


def grow_tokenizer(source: Path, out: Path) -> Vocabulary:
    """Add AKI's tokens to the tokenizer of a language model's folder and write it to ``out``.

    ``<pad>`` is added only where the tokenizer has no padding token or pads with its end-of-text token, as the release
    does; then ``<image>`` and ``<|endofchunk|>``. What is written gives the ids of Tokenizer, also with transformers
    alone. A tokenizer that was grown before stays as it is.

    Raises DataError where the folder has no fast tokenizer or no end-of-text token, or where the added tokens would not
    be its last ones.
    """
    loaded = open_fast_tokenizer(source)
    _add_tokens(loaded, source)
    size, ids = len(loaded), loaded.get_vocab()
    image_id, endofchunk_id = ids[IMAGE_TOKEN], ids[ENDOFCHUNK_TOKEN]
    if (image_id, endofchunk_id) != (size - 2, size - 1):
        raise DataError(
            f"Tokenizer {source} has {size} tokens; {IMAGE_TOKEN} and {ENDOFCHUNK_TOKEN} must be the last two, and are "
            f"{image_id} and {endofchunk_id}. Give the tokenizer of the language model as it was published."
        )
    _with_training_ids(loaded).save_pretrained(str(out))
    return Vocabulary(
        vocab_size=image_id,
        num_added_tokens=2,
        bos_id=loaded.bos_token_id,
        eos_id=loaded.eos_token_id,
        pad_id=loaded.pad_token_id,
        image_id=image_id,
        endofchunk_id=endofchunk_id,
    )


def _add_tokens(loaded: PreTrainedTokenizerFast, folder: Path) -> None:
    """Add AKI's tokens where they are missing: <pad> only where nothing else than the end of text would pad."""
    if loaded.eos_token_id is None:
        raise DataError(f"Tokenizer {folder} names no end-of-text token (eos_token in tokenizer_config.json); name it.")
    needs_pad = loaded.pad_token_id in (None, loaded.eos_token_id)
    names = (PAD_TOKEN, IMAGE_TOKEN, ENDOFCHUNK_TOKEN) if needs_pad else (IMAGE_TOKEN, ENDOFCHUNK_TOKEN)
    # without strip flags: the newline after <image> stays and is tokenized, as in the release
    added = [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]
    loaded.add_tokens(added, special_tokens=True)
    if needs_pad:
        loaded.pad_token = PAD_TOKEN


def _with_training_ids(loaded: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return the tokenizer without a space before text that follows a special token; itself where it puts none."""
    rules = json.loads(loaded.backend_tokenizer.to_str())
    stripped = _without_prefix_rules(rules)
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


def open_fast_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a local folder with transformers. Raises DataError where there is none."""
    if not folder.is_dir():
        raise DataError(f"Tokenizer folder {folder} does not exist (data.tokenizer).")
    if not (folder / "tokenizer.json").is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise DataError(
            f"Tokenizer folder {folder} has no tokenizer.json (found: {found}). A fast tokenizer is needed; "
            "save it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    for path in sorted(folder.glob("*.json")):
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        if "git-lfs" in (kind := file_kind(head)):
            raise DataError(f"Tokenizer folder {folder}: {path.name} is {kind}.")
    try:
        # False: a folder that brings code (one that to-hf wrote) would have transformers ask whether to run it
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises bare Exception for malformed JSON; the cause is kept
        if fault := _config_fault(folder):
            raise DataError(
                f"{folder / 'config.json'}, which transformers reads with the tokenizer, has a fault: {fault}. Correct "
                "it, or give a folder with the tokenizer's files alone."
            ) from error
        raise DataError(f"Tokenizer folder {folder} cannot be read: {error}") from error
    if not isinstance(loaded, PreTrainedTokenizerFast):
        raise DataError(f"Tokenizer folder {folder} gives {type(loaded).__name__}, which is not a fast tokenizer.")
    return loaded


def _config_fault(folder: Path) -> str:
    """Return why transformers cannot read the folder's config.json; empty where it can, or where there is none."""
    if not (folder / "config.json").is_file():
        return ""
    try:
        AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # anything: a division by zero, a missing key
        return f"{type(error).__name__}: {error}" if isinstance(error, ArithmeticError | KeyError) else str(error)
    return ""


def _without_prefix_rules(rules: dict[str, Any]) -> dict[str, Any]:
    """Return the rules of a tokenizer.json without a space before text, without truncation and padding."""
    normalizer, pre_tokenizer = _without_prefix(rules["normalizer"]), _without_prefix(rules["pre_tokenizer"])
    return {**rules, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "truncation": None, "padding": None}


def _without_prefix(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer of tokenizer.json without the part that puts a space before a segment."""
    if rule is None or rule["type"] == "Prepend":
        return None
    if rule["type"] == "Metaspace":
        return {**rule, "prepend_scheme": "never"}
    for parts in ("normalizers", "pretokenizers"):
        if parts in rule:
            kept = [part for part in map(_without_prefix, rule[parts]) if part is not None]
            return {**rule, parts: kept}
    return rule


def _byte_of_letter() -> dict[str, int]:
    """Return how byte-level vocabularies write bytes: the letter of that number if it prints, else U+0100 and on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
