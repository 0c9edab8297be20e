"""The demo's tokenizer: a sentencepiece model, and the same as a Hugging Face folder like Phi-3.5's.

Llama's conventions (<unk> 0, <s> 1, </s> 2, byte fallback, a space before the text, no normalization), then Phi-3.5's
added tokens in its order after the base vocabulary.

Byte-pair merges may cross words, so that each constant text (the system message, the instructions, the phrasing of the
questions) is one token, while every colour, kind, cell, number and corner of a box is a token of its own: samples have
about twenty text tokens, so that training on two cores takes minutes.
"""

import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.synthetic.questions import (
    TASKS,
    sample_multiple_choice,
    sample_objects,
    sample_statement,
    scene_caption,
)
from aki_megatron.synthetic.scenes import (
    CELL_NAMES,
    COLORS,
    GRID_SIZE,
    IMAGE_PIXELS,
    SHAPES,
    Scene,
    sample_scene,
    scene_rng,
)

VOCAB_SIZE = 754
"""Pieces of the sentencepiece model, 256 bytes and three control pieces included. Fixed, since configs depend on it:
with Phi-3.5's eleven added tokens and AKI's three (<pad>, <image>, <|endofchunk|>) there are 768 tokens."""

ADDED_TOKENS = (
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
)
"""Phi-3.5's added tokens in the order of their ids. All but the first absorb the white space after them."""

SPACE = "\u2581"
"""sentencepiece's character for a space."""

_DELIMITER = "\x1f"
"""Separates the pieces of a training line, so that no merge crosses; never part of a text."""
_NUM_SCENES = 1000
"""Scenes whose texts train the model, from a random stream of their own: the tokenizer does not depend on the seed."""
_KEEP_CONSTANT_EVERY = 10
_MAX_PIECE_LENGTH = 256
_MODEL_MAX_LENGTH = 4096

_WORD = "Answer the question using a single word or phrase."
_LETTER = "Answer with the option's letter from the given choices directly."
_REGION = "Provide a short description for this region."
_YES_OR_NO = "Please answer yes or no."


def _any(words: tuple[str, ...]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_PIECE = re.compile(
    # constant texts first: they contain words that would match below
    rf"{re.escape(SYSTEM_MESSAGE)}|\n(?:{_WORD}|{re.escape(_LETTER)})|\n{_REGION} <bbox>|\? {_YES_OR_NO}| Is there a"
    # texts that vary from scene to scene
    rf"|( (?:left of|right of|above|below) the|\[[^\]]*\]|</bbox>| ?(?:{_any(CELL_NAMES)})(?: \()?"
    rf"| ?(?:{_any(COLORS)})| (?:{_any(SHAPES)})|\b ?[abcd]\b|\)[,.]|\b\d\b)"
)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.model, tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    folder.mkdir(parents=True, exist_ok=True)
    model = train_sentencepiece()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(fast_tokenizer(model).to_str(pretty=True))
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": False,
        "add_eos_token": False,
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _MODEL_MAX_LENGTH,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def train_sentencepiece() -> bytes:
    """Train the byte-pair model; return its file, the same bytes every time."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=_training_lines(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_by_whitespace=False,
        split_by_number=False,
        split_by_unicode_script=False,
        max_sentencepiece_length=_MAX_PIECE_LENGTH,
        pretokenization_delimiter=_DELIMITER,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def intended_pieces(text: str) -> list[tuple[str, bool]]:
    """Split a text into the pieces that are to be one token each; True for those that vary from scene to scene."""
    found, end = [], 0
    for match in _PIECE.finditer(text):
        found += [(text[end : match.start()], False), (match.group(), match.group(1) is not None)]
        end = match.end()
    return [(piece, varies) for piece, varies in [*found, (text[end:], False)] if piece]


def _training_lines() -> Iterator[str]:
    """Yield the texts, split into pieces; of each constant piece only every tenth occurrence.

    Merges go by frequency, and those of the varying words must come first: "e a" of "Please answer" would otherwise
    tear "blue a" apart.
    """
    seen: Counter[str] = Counter()
    for text in training_texts():
        pieces = intended_pieces(text)
        kept = [piece for piece, varies in pieces if varies or seen[piece] % _KEEP_CONSTANT_EVERY == 0]
        seen.update(piece for piece, _ in pieces)
        if kept:
            yield _DELIMITER + _DELIMITER.join(kept)


def training_texts() -> Iterator[str]:
    """Yield captions, prompts and answers of a thousand scenes, as the templates put them between special tokens."""
    for index in range(_NUM_SCENES):
        scene = sample_scene(scene_rng(0, "tokenizer", index))
        rng = random.Random(f"tokenizer/{index}")
        yield SYSTEM_MESSAGE
        yield scene_caption(scene)
        for question in filter(None, (task(scene, rng) for task in TASKS.values())):
            yield f"\n{_WORD} {question.text}"
            yield question.answer
        yield from _other_prompts(scene, rng)


def _other_prompts(scene: Scene, rng: random.Random) -> Iterator[str]:
    """Yield prompts as VSR's, A-OKVQA's and RefCOCO's readers phrase them."""
    question = sample_statement(scene, rng).text.removeprefix("The ").removesuffix(".").replace(" is ", " ", 1)
    yield f"\n{_WORD} Is the {question}? {_YES_OR_NO}"
    choice = sample_multiple_choice(scene, rng)
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", choice.options, strict=True))
    yield f"\n{_LETTER} {choice.text}\nOptions:\n{options}\n"
    yield "ABCD"[choice.correct]
    for item in sample_objects(scene, rng, max_objects=GRID_SIZE):
        x, y, width, height = (side / IMAGE_PIXELS for side in item.cell_box)
        yield f"\n{_REGION} <bbox>[{x:.3f}, {y:.3f}][{x + width:.3f}, {y + height:.3f}]</bbox>"


def fast_tokenizer(model: bytes) -> tokenizers.Tokenizer:
    """Convert the sentencepiece model to the tokenizers library and add Phi-3.5's added tokens."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    fast = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=_merges(vocabulary, pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    added = [tokenizers.AddedToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    for name in ADDED_TOKENS:
        added.append(tokenizers.AddedToken(name, normalized=False, special=True, rstrip=name != ADDED_TOKENS[0]))
    fast.add_special_tokens(added)
    return fast


def _merges(vocabulary: dict[str, int], pieces: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """Return the pairs in the order in which byte-pair encoding merges them.

    sentencepiece merges whichever neighbours form the piece of the best score; the tokenizers library goes through a
    list of pairs. So every split of a piece into two pieces becomes a pair, in the order of the pieces' scores.
    """
    ordinary = [
        (-pieces.get_score(number), number, piece)
        for piece, number in vocabulary.items()
        if not (pieces.is_byte(number) or pieces.is_control(number) or pieces.is_unknown(number))
    ]
    return [
        (piece[:end], piece[end:])
        for _, _, piece in sorted(ordinary)
        for end in range(1, len(piece))
        if piece[:end] in vocabulary and piece[end:] in vocabulary
    ]
