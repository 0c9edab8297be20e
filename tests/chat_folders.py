"""Small tokenizers of every family, with the special tokens and the rules of the published ones.

Phi-3's is in tests/data/phi3_like. The others are byte-level, trained here on a few sentences.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

PHI3_LIKE = Path(__file__).parent / "data/phi3_like"

SENTENCES = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. system\nuser\nassistant\n\n",
    "What is in the picture? A red box. And to the left of it? Nothing at all. yes" + "\n\n\n\nno" * 9,
    "Answer the question using a single word or phrase.\nHow many cats are there? 12 The red cat is beside the dish. ",
)
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Rules:
    """The properties of a published tokenizer that matter here."""

    specials: tuple[str, ...]
    named: Mapping[str, str | None]
    """Keys of tokenizer_config.json: bos_token, eos_token, pad_token, and tokenizer_class of families that have one."""
    digits: str = ""
    """Quantifier of digits in the regular expression that splits text."""
    normalizer: Any = None
    plain: tuple[str, ...] = field(default=())
    """Added tokens that are not special."""
    trims: bool = False
    """Whether its offsets leave white space out, and its post-processor adds bos_token."""


_QWEN2 = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")
_CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}

RULES = {
    "llama": Rules(
        specials=(
            "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>",
            "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
        ),
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        digits="{1,3}",
        trims=True,
    ),
    "qwen2": Rules(_QWEN2, _CHATML, normalizer=normalizers.NFC(), plain=("<tool_call>",)),
    "qwen3": Rules(_QWEN2, _CHATML, normalizer=normalizers.NFC(), plain=("<tool_call>", "<think>", "</think>")),
}  # fmt: skip


def chat_folder(folder: Path, family: str) -> Path:
    """A tokenizer folder of a family, like that of its published instruction model."""
    return PHI3_LIKE if family == "phi3" else byte_level(folder, RULES[family], SENTENCES)


def byte_level(folder: Path, rules: Rules, sentences: Sequence[str] = ()) -> Path:
    """Write a byte-level tokenizer: 256 bytes, merges trained on the sentences, then the added tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = rules.normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT % rules.digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, min_frequency=1, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in rules.specials])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in rules.plain])
    if rules.trims:
        bos = rules.named["bos_token"]
        add_bos = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), add_bos])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **rules.named})
    )
    return folder
