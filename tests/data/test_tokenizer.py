"""The fast tokenizer gives the slow one's ids, ids are looked up by name, and broken folders are refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from chat_folders import PHI3_LIKE
from hypothesis import given
from hypothesis import strategies as st

from aki_megatron.config.model import DecoderConfig
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.families.base import ENDOFCHUNK_TOKEN, IMAGE_TOKEN
from aki_megatron.families.registry import FAMILIES

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SLOW = json.loads((PHI3_LIKE / "slow_ids.json").read_text())


def test_ids_are_added_in_the_order_of_the_release(tokenizer: Tokenizer) -> None:
    # 500 pieces + 11 added tokens of Phi-3.5; with its 32000 pieces these would be 32011, 32012, 32013 and 32014
    assert (tokenizer.pad_id, tokenizer.image_id, tokenizer.endofchunk_id, tokenizer.num_tokens) == (511, 512, 513, 514)
    assert (tokenizer.eos_id, tokenizer.sample_end_id, tokenizer.turn_end_id, tokenizer.stop_ids) == (
        500,
        500,
        507,
        {500, 501, 507},
    )


@pytest.mark.parametrize("case", SLOW, ids=range(len(SLOW)))
def test_fast_ids_equal_the_slow_tokenizer_of_the_release(tokenizer: Tokenizer, case: dict) -> None:
    text = case["text"]
    # the slow tokenizer puts a lone space before a leading <|system|>; the template writes it out
    start = "<s> " if text.startswith(SYSTEM) else "<s>"
    ids = tokenizer.encode(f"{start}{text}<|endoftext|>")
    assert ids == case["ids"]


def slow_ids(model: sentencepiece.SentencePieceProcessor, tokenizer: Tokenizer, text: str) -> list[int]:
    """Reimplement transformers' slow Llama tokenizer (legacy=False): split at special tokens, sentencepiece between."""
    specials = {
        USER: True,
        END: True,
        ASSISTANT: True,
        IMAGE_TOKEN: False,
        ENDOFCHUNK_TOKEN: False,
    }  # name -> swallows white space
    guard = model.encode("<unk>")
    ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, specials)) + ")", text):
        if piece in specials:
            ids.append(tokenizer.token_id(piece))
        elif piece:
            stripped = bool(ids) and specials.get(tokenizer.token_name(ids[-1]), False)
            ids += model.encode("<unk>" + (piece.lstrip() if stripped else piece))[len(guard) :]
    return ids


@pytest.fixture(scope="module")
def sentencepiece_model() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(PHI3_LIKE / "tokenizer.model"))


WORDS = st.lists(
    st.sampled_from(
        ["\n", " ", "  ", "The", "red", " cat", "12", "0.333", "\u4e16", "\u00e9", "\t", "dish.", "<bbox>["]
    ),
    max_size=8,
).map("".join)


@given(question=WORDS, answer=WORDS, caption=WORDS)
def test_fast_ids_equal_sentencepiece_on_any_text(
    tokenizer: Tokenizer,
    sentencepiece_model: sentencepiece.SentencePieceProcessor,
    question: str,
    answer: str,
    caption: str,
) -> None:
    for text in (
        f"{USER}\n{IMAGE_TOKEN}\n{question}{END}\n{ASSISTANT}\n{answer}",
        f"{IMAGE_TOKEN}{caption}{ENDOFCHUNK_TOKEN}",
    ):
        assert tokenizer.encode(text) == slow_ids(sentencepiece_model, tokenizer, text)


def test_newline_vanishes_after_a_chat_token_and_stays_after_the_image(tokenizer: Tokenizer) -> None:
    names = [tokenizer.token_name(i) for i in tokenizer.encode(f"{USER}\n{IMAGE_TOKEN}\ncat{END}\n")]
    assert names[:3] == [USER, IMAGE_TOKEN, "<0x0A>"] and names[-1] == END


def test_decode_leaves_special_tokens_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("red cat \u4e16<|endoftext|>")
    assert tokenizer.decode(ids) == "red cat \u4e16"


def test_same_ids_with_a_model_config_beside_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # a whole model folder: transformers then takes another class for it
    folder = shutil.copytree(PHI3_LIKE, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "phi3"}))
    other = Tokenizer(folder, FAMILIES["phi3"].chat)
    for case in SLOW:
        assert other.encode(case["text"]) == tokenizer.encode(case["text"])


def test_missing_folder_and_missing_fast_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        Tokenizer(tmp_path / "nowhere", FAMILIES["phi3"].chat)
    folder = shutil.copytree(PHI3_LIKE, tmp_path / "slow_only")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"no tokenizer\.json \(found: .*tokenizer\.model"):
        Tokenizer(folder, FAMILIES["phi3"].chat)
    (folder / "tokenizer.json").write_text("{ broken")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(folder, FAMILIES["phi3"].chat)


def test_a_missing_special_token_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(PHI3_LIKE, tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace(ASSISTANT, "<|bot|>"))
    with pytest.raises(DataError, match=re.escape(f"lacks the special tokens {ASSISTANT};")):
        Tokenizer(folder, FAMILIES["phi3"].chat)


@pytest.mark.parametrize(
    ("padded", "base", "added", "message"),
    [
        (640, 512, 1, r"512 \+ 1 = 513, but the tokenizer .* has 514 tokens"),
        (640, 511, 3, "vocab_size=511, but the added tokens start at <image>, whose id in .* is 512"),
        (500, 512, 2, "padded_vocab_size=500 cannot hold vocab_size=512"),
    ],
)
def test_model_of_another_vocabulary_is_refused(
    tokenizer: Tokenizer, padded: int, base: int, added: int, message: str
) -> None:
    decoder = DecoderConfig.model_construct(padded_vocab_size=padded, vocab_size=base, num_added_tokens=added)
    with pytest.raises(ConfigError, match=message):
        tokenizer.check_vocabulary(decoder)


@pytest.mark.parametrize(("base", "added"), [(512, 2), (514, 0)])
def test_model_of_this_vocabulary_is_accepted(tokenizer: Tokenizer, base: int, added: int) -> None:
    tokenizer.check_vocabulary(DecoderConfig(padded_vocab_size=640, vocab_size=base, num_added_tokens=added))
