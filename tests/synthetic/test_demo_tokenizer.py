"""The demo's tokenizer: equal to sentencepiece, Phi-3.5's special tokens, short samples, words of one token."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.data.sources import aokvqa, boxes, vqav2, vsr
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.families.registry import FAMILIES
from aki_megatron.synthetic.demo_tokenizer import (
    ADDED_TOKENS,
    SPACE,
    VOCAB_SIZE,
    fast_tokenizer,
    intended_pieces,
    train_sentencepiece,
    training_texts,
    write_tokenizer,
)
from aki_megatron.synthetic.scenes import CELL_NAMES, COLORS, KINDS, LETTERS, SHAPES

PHI_3_5 = {  # offset from the 32000 pieces of the base vocabulary, from the published tokenizer
    "<|endoftext|>": 0,
    "<|assistant|>": 1,
    "<|placeholder1|>": 2,
    "<|placeholder2|>": 3,
    "<|placeholder3|>": 4,
    "<|placeholder4|>": 5,
    "<|system|>": 6,
    "<|end|>": 7,
    "<|placeholder5|>": 8,
    "<|placeholder6|>": 9,
    "<|user|>": 10,
}
MODEL = train_sentencepiece()
SLOW = sentencepiece.SentencePieceProcessor(model_proto=MODEL)
FAST = fast_tokenizer(MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    write_tokenizer(path)
    return path


def pieces(text: str) -> list[str]:
    """Tokens of text that follows a special token, as the templates' tokenizer sees it."""
    return [SLOW.id_to_piece(number) for number in SLOW.encode(f"\x00{text}")][2:]  # after the prefix and a byte


def test_training_is_repeatable_and_has_the_fixed_size(folder: Path) -> None:
    assert train_sentencepiece() == MODEL == (folder / "tokenizer.model").read_bytes()
    assert SLOW.get_piece_size() == VOCAB_SIZE
    assert (SLOW.unk_id(), SLOW.bos_id(), SLOW.eos_id(), SLOW.pad_id()) == (0, 1, 2, -1)
    assert SLOW.piece_to_id("<0x00>") == 3 and SLOW.is_byte(258)


def test_special_tokens_have_the_order_and_flags_of_phi_3_5() -> None:
    assert {name: VOCAB_SIZE + offset for name, offset in PHI_3_5.items()} == {
        name: FAST.token_to_id(name) for name in ADDED_TOKENS
    }
    strips = {token.content: token.rstrip for token in FAST.get_added_tokens_decoder().values()}
    assert strips == {"<unk>": False, "<s>": False, "</s>": False} | {name: name != "<|endoftext|>" for name in PHI_3_5}
    absorbed = FAST.encode("<s><|user|>\n \nyes<|end|>\n<|endoftext|>").ids
    assert absorbed == FAST.encode("<s><|user|>yes<|end|><|endoftext|>").ids
    assert FAST.encode("<|endoftext|>\n").ids != FAST.encode("<|endoftext|>").ids


def test_fast_tokenizer_equals_sentencepiece_on_the_data() -> None:
    for text in training_texts():
        assert FAST.encode(text).ids == SLOW.encode(text), text
        assert FAST.decode(FAST.encode(text).ids) == text


def random_mixes() -> Iterator[str]:
    rng = random.Random(0)
    words = [
        *COLORS,
        *KINDS,
        *CELL_NAMES,
        "the",
        "a",
        "is",
        "objects",
        "0.333",
        ", ",
        "?",
        ".",
        "[",
        "(",
        "\n",
        "  ",
        "zebra",
    ]
    for _ in range(2000):
        yield "".join(rng.choice(("", " ")) + rng.choice(words) for _ in range(rng.randrange(1, 12)))


def test_fast_tokenizer_equals_sentencepiece_on_shuffled_words() -> None:
    for text in random_mixes():
        assert FAST.encode(text).ids == SLOW.encode(text), text


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=40))
def test_fast_tokenizer_equals_sentencepiece_on_any_text(text: str) -> None:
    text = text.replace("<", "")  # special tokens written out are not part of this test
    assert FAST.encode(text).ids == SLOW.encode(text)
    assert FAST.decode(SLOW.encode(text)) == text


@pytest.mark.parametrize("word", [*COLORS, *SHAPES, *LETTERS, *CELL_NAMES])
def test_content_words_are_one_token_after_a_space(word: str) -> None:
    assert pieces(f" {word}") == [SPACE + word]


@pytest.mark.parametrize("answer", [*COLORS, *LETTERS, *"01234", "yes", "no", *"ABCD"])
def test_answers_are_one_token(answer: str) -> None:
    assert pieces(answer) == [answer]


def test_an_object_has_the_same_tokens_in_captions_and_in_answers() -> None:
    assert pieces("red circle") == ["red", SPACE + "circle"]
    assert pieces("top-left (red circle), center (blue a).") == [
        *(f"top-left{SPACE}(", "red", f"{SPACE}circle", "),", f"{SPACE}center{SPACE}(", "blue", f"{SPACE}a", ").")
    ]


def test_texts_are_tokenized_into_the_intended_pieces() -> None:
    for text in training_texts():
        assert pieces(text) == [piece.replace(" ", SPACE) for piece, _ in intended_pieces(text)], text


def test_the_letter_a_is_never_the_article() -> None:
    for text in training_texts():
        before, now = "", ""
        for piece in pieces(text):
            before, now = now, piece.strip(SPACE)
            if now == "a" and piece != text:  # an answer by itself is the letter
                assert before in COLORS or before.endswith(f"is{SPACE}the"), text


def test_instructions_are_one_token() -> None:
    constant = [
        SYSTEM_MESSAGE,
        "\n" + vqav2.PROMPT.format(question="").strip(" "),
        "\n" + aokvqa.PROMPT.partition(" {")[0],
        "\n" + boxes.PROMPT.format(box="<bbox>"),
        "?" + vsr.PROMPT.rpartition("}")[2],
    ]
    for text in constant:
        assert len(pieces(text)) == 1, pieces(text)
    assert pieces(" " + boxes.box_text((12, 0, 12, 12), 36, 36))[-3:] == [
        *(f"[0.333,{SPACE}0.000]", f"[0.667,{SPACE}0.333]", "</bbox>")
    ]


def test_the_folder_loads_as_a_fast_tokenizer(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert loaded.is_fast
    special = (loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token)
    assert special == ("<s>", "<|endoftext|>", "<|endoftext|>", "<unk>")
    for text in list(training_texts())[:200]:
        assert loaded(text, add_special_tokens=True)["input_ids"] == SLOW.encode(text)
    text = "How many red objects are there?"
    encoded = loaded(text, return_offsets_mapping=True)
    assert [text[start:end] for start, end in encoded["offset_mapping"]][-2:] == [" red", " objects are there?"]
    assert loaded.decode(encoded["input_ids"]) == text
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab() == FAST.get_vocab()
    assert json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == "<|endoftext|>"


def test_the_templates_tokenizer_adds_three(folder: Path) -> None:
    tokenizer = Tokenizer(folder, FAMILIES["phi3"].chat)
    end = VOCAB_SIZE + len(ADDED_TOKENS)
    assert (tokenizer.pad_id, tokenizer.image_id, tokenizer.endofchunk_id, tokenizer.num_tokens) == (
        end,
        end + 1,
        end + 2,
        768,
    )
    ids = tokenizer.encode("<|assistant|>\nred circle<|endoftext|>")
    assert [tokenizer.token_name(number) for number in ids[1:-1]] == ["red", f"{SPACE}circle"]
    assert tokenizer.decode(ids) == "red circle"
