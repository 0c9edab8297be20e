"""Tokenizers grown for AKI: which tokens are added, at which ids, and that encoding gives the ids of training."""

import json
from pathlib import Path

import pytest
from chat_folders import PHI3_LIKE, Rules, byte_level
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from aki_megatron.data.tokenizer import Tokenizer, Vocabulary, grow_tokenizer
from aki_megatron.errors import DataError
from aki_megatron.families.base import ENDOFCHUNK_TOKEN, IMAGE_TOKEN
from aki_megatron.families.registry import FAMILIES

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def bytes_only(folder: Path, specials: tuple[str, ...], *, eos: str | None, pad: str | None) -> Path:
    """Write a byte-level tokenizer as LLaMA 3 and Qwen have: 256 bytes, then special tokens."""
    return byte_level(folder, Rules(specials, {"eos_token": eos, "pad_token": pad}))


def test_phi_3_gets_the_ids_of_the_release_and_keeps_those_of_training(tmp_path: Path) -> None:
    # 500 pieces here and 32000 there: 32011, 32012, 32013
    sizes = {"vocab_size": 512, "num_added_tokens": 2}
    expected = Vocabulary(**sizes, bos_id=1, eos_id=500, pad_id=511, image_id=512, endofchunk_id=513)
    assert grow_tokenizer(PHI3_LIKE, tmp_path / "grown") == expected
    training, grown = Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat), Tokenizer(tmp_path / "grown", FAMILIES["phi3"].chat)
    plain = AutoTokenizer.from_pretrained(str(tmp_path / "grown"))
    assert (grown.num_tokens, plain.pad_token_id, plain.eos_token_id, plain.bos_token_id) == (514, 511, 500, 1)
    for case in json.loads((PHI3_LIKE / "slow_ids.json").read_text()):
        text = f"<s>{case['text']}{IMAGE_TOKEN}\nred cat{ENDOFCHUNK_TOKEN} dog<|endoftext|>"
        ids = training.encode(text)
        assert grown.encode(text) == ids
        assert plain(text, add_special_tokens=False)["input_ids"] == ids
        assert plain.decode(ids, skip_special_tokens=True) == training.decode(ids)
    untouched = AutoTokenizer.from_pretrained(str(PHI3_LIKE))
    assert untouched("cat", add_special_tokens=False)["input_ids"] != training.encode("cat")


@pytest.mark.parametrize(
    ("specials", "eos", "pad", "expected"),
    [
        # LLaMA: no padding token
        (("<s>", "<eot>"), "<eot>", None, Vocabulary(259, 2, None, 257, 258, 259, 260)),
        # Qwen, instructed: pads with another token than the one that ends a text
        (("<eot>", "<im_end>"), "<im_end>", "<eot>", Vocabulary(258, 2, None, 257, 256, 258, 259)),
        # Qwen, base: pads with the one that ends a text
        (("<eot>",), "<eot>", "<eot>", Vocabulary(258, 2, None, 256, 257, 258, 259)),
    ],
    ids=["none", "own", "end of text"],
)
def test_a_padding_token_is_added_only_where_there_is_none_of_its_own(
    specials: tuple[str, ...], eos: str, pad: str | None, expected: Vocabulary, tmp_path: Path
) -> None:
    source = bytes_only(tmp_path / "source", specials, eos=eos, pad=pad)
    assert grow_tokenizer(source, tmp_path / "grown") == expected
    assert grow_tokenizer(tmp_path / "grown", tmp_path / "again") == expected, "a grown tokenizer is not grown again"
    before, after = (AutoTokenizer.from_pretrained(str(folder)) for folder in (source, tmp_path / "again"))
    assert after.pad_token_id == expected.pad_id
    text = f" cat{specials[0]} dog\n"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after(f"{IMAGE_TOKEN}\n{ENDOFCHUNK_TOKEN}")["input_ids"] == [
        expected.image_id,
        BYTES.index("\u010a"),
        expected.endofchunk_id,
    ]


def test_tokens_at_other_ids_and_a_missing_end_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"<image> and <\|endofchunk\|> must be the last two, and are 256 and 259"):
        grow_tokenizer(
            bytes_only(tmp_path / "early", (IMAGE_TOKEN, "<eot>"), eos="<eot>", pad=None), tmp_path / "grown"
        )
    with pytest.raises(DataError, match="names no end-of-text token"):
        grow_tokenizer(bytes_only(tmp_path / "endless", ("<eot>",), eos=None, pad=None), tmp_path / "grown")
    assert not (tmp_path / "grown").exists()
