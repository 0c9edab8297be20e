"""Conversations, captions and prompts of every family: their text, their tokens, and which tokens are supervised.

The texts are written out here: the special tokens of the published chat templates, the papers' content between them.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from chat_folders import RULES, SENTENCES, byte_level, chat_folder

from aki_megatron.config.model import DecoderConfig
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer, grow_tokenizer
from aki_megatron.errors import DataError
from aki_megatron.families.registry import FAMILIES
from aki_megatron.types import IGNORE, Caption, Conversation, Modality, Sample, Turn, image_items

NUM_LATENTS = 3
TEXT, RESPONSE, IMAGE = Modality.TEXT, Modality.RESPONSE, Modality.IMAGE
SYSTEM = "The assistant gives polite answers."
DIALOGUE = Conversation(
    "key", (Turn("What is in the picture?", "A red box."), Turn("How many?", "12")), image_items(b"x")
)
CAPTION = Caption("key", " The red cat.\n", b"x")

LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA_ANSWER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA = [
    (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nThe assistant gives polite answers.<|eot_id|>"
        + LLAMA_USER,
        TEXT,
    ),
    ("<image>", IMAGE),
    ("\nWhat is in the picture?" + LLAMA_ANSWER, TEXT),
    ("A red box.<|eot_id|>", RESPONSE),
    (LLAMA_USER + "How many?" + LLAMA_ANSWER, TEXT),
    ("12<|eot_id|>", RESPONSE),
]
CHATML = [
    ("<|im_start|>system\nThe assistant gives polite answers.<|im_end|>\n<|im_start|>user\n", TEXT),
    ("<image>", IMAGE),
    ("\nWhat is in the picture?<|im_end|>\n<|im_start|>assistant\n", TEXT),
    ("A red box.<|im_end|>", RESPONSE),
    ("\n<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n", TEXT),
    ("12<|im_end|>", RESPONSE),
]
PHI3 = [
    ("<s> <|system|>\nThe assistant gives polite answers.<|end|>\n<|user|>\n", TEXT),
    ("<image>", IMAGE),
    ("\nWhat is in the picture?<|end|>\n<|assistant|>\n", TEXT),
    ("A red box.<|end|>", RESPONSE),
    ("\n<|user|>\nHow many?<|end|>\n<|assistant|>\n", TEXT),
    ("12<|endoftext|>", RESPONSE),
]
DIALOGUES = {"phi3": PHI3, "llama": LLAMA, "qwen2": CHATML, "qwen3": CHATML}
CAPTIONS = {
    "phi3": ("<s>", "The red cat.", "<|endofchunk|><|endoftext|>"),
    "llama": ("<|begin_of_text|>", "The red cat.", "<|endofchunk|><|eot_id|>"),
    "qwen2": ("", "The red cat.", "<|endofchunk|><|im_end|>"),
    "qwen3": ("", "The red cat.", "<|endofchunk|><|im_end|>"),
}
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {family: chat_folder(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def templates(folders: dict[str, Path]) -> dict[str, Template]:
    return {
        family: Template(Tokenizer(folders[family], FAMILIES[family].chat), {Modality.IMAGE: NUM_LATENTS}, 512, SYSTEM)
        for family in FAMILIES
    }


def expanded(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids with the image token repeated for every image position."""
    at = ids.index(tokenizer.image_id)
    return [*ids[:at], *[tokenizer.image_id] * NUM_LATENTS, *ids[at + 1 :]]


def supervised(sample: Sample) -> list[int]:
    return [target for target in sample.targets if target != IGNORE]


@EACH_FAMILY
def test_a_dialogue_equals_the_published_template(family: str, templates: dict[str, Template]) -> None:
    template, expected = templates[family], DIALOGUES[family]
    tokenizer = template.tokenizer
    assert [(part.text, part.modality) for part in template.conversation_parts(DIALOGUE)] == expected
    sample = template.render_conversation(DIALOGUE)
    assert sample is not None
    whole = "".join(text for text, _ in expected)
    assert sample.token_ids == expanded(tokenizer, tokenizer.encode(whole)), (
        "equal to tokenizing the whole text at once"
    )
    # the expected modalities do not depend on parts: they come from the number of tokens of ever longer prefixes
    prefix, modalities = "", []
    for text, modality in expected:
        prefix += text
        tokens = len(tokenizer.encode(prefix)) + (
            NUM_LATENTS - 1 if tokenizer.image_id in tokenizer.encode(prefix) else 0
        )
        modalities += [int(modality)] * (tokens - len(modalities))
    assert sample.modality_ids == modalities
    answers = [text for text, modality in expected if modality == RESPONSE]
    assert supervised(sample) == [token for answer in answers for token in tokenizer.encode(answer)]
    following = zip(sample.token_ids[1:], sample.modality_ids[1:], strict=True)
    assert sample.targets == [token if modality == RESPONSE else IGNORE for token, modality in following] + [IGNORE]


@EACH_FAMILY
def test_a_prompt_ends_with_the_whole_header_and_all_of_it_is_prompt(
    family: str, templates: dict[str, Template]
) -> None:
    template = templates[family]
    tokenizer = template.tokenizer
    first = replace(DIALOGUE, turns=DIALOGUE.turns[:1])
    prompt = template.render_prompt(first)
    text = "".join(text for text, _ in DIALOGUES[family][:3])
    assert prompt.token_ids == expanded(tokenizer, tokenizer.encode(text))
    assert {modality for modality in prompt.modality_ids if modality != IMAGE} == {TEXT}
    header = {
        "phi3": ["<|assistant|>"],  # strips the newline
        "llama": ["<|start_header_id|>", "assistant", "<|end_header_id|>", "\u010a\u010a"],
        "qwen2": ["<|im_start|>", "assistant", "\u010a"],
    }
    expected = header.get(family, header["qwen2"])
    assert [tokenizer.token_name(token) for token in prompt.token_ids[-len(expected) :]] == expected
    sample = template.render_conversation(first)
    assert sample is not None
    # the last token of the header predicts the first of the response
    assert sample.targets[len(prompt.token_ids) - 1] == tokenizer.encode("A red box.")[0]
    assert sample.token_ids[: len(prompt.token_ids)] == prompt.token_ids
    assert set(sample.modality_ids[len(prompt.token_ids) :]) == {RESPONSE}


@EACH_FAMILY
def test_a_caption(family: str, templates: dict[str, Template]) -> None:
    start, text, ending = CAPTIONS[family]
    template = templates[family]
    tokenizer = template.tokenizer
    first, caption, last = (tokenizer.encode(part) for part in (start, text, ending))
    sample = template.render_caption(CAPTION)
    assert sample is not None
    assert sample.token_ids == [*first, *[tokenizer.image_id] * NUM_LATENTS, *caption, *last]
    assert sample.modality_ids == [TEXT] * len(first) + [IMAGE] * NUM_LATENTS + [RESPONSE] * (len(caption) + 2)
    assert supervised(sample) == [*caption, *last] and len(last) == 2
    text_first = replace(template, text_first=True).render_caption(CAPTION)
    assert text_first is not None
    assert text_first.token_ids == [*first, *caption, *[tokenizer.image_id] * NUM_LATENTS, *last]
    # the first token of a sequence is no target: without a start token it is the caption's first
    assert supervised(text_first) == [*caption, *last][0 if first else 1 :]


@EACH_FAMILY
@pytest.mark.parametrize("response", ["red", " red", "\n\nred", " \n red", "\tred", "\r\n\n\n12", "e\u0301", "\u0301"])
def test_no_token_spans_prompt_and_response(family: str, response: str, templates: dict[str, Template]) -> None:
    template = templates[family]
    asked = Conversation("key", (Turn(" \n?\n", response), Turn("\n\nWhy?", response)), image_items(b"x"))
    prompt, sample = template.render_prompt(replace(asked, turns=asked.turns[:1])), template.render_conversation(asked)
    assert sample is not None
    size = len(prompt.token_ids)
    assert (sample.token_ids[:size], sample.modality_ids[:size]) == (prompt.token_ids, prompt.modality_ids)
    assert sample.modality_ids[size] == RESPONSE
    assert template.render_prompt(asked).token_ids == sample.token_ids[: len(template.render_prompt(asked).token_ids)]


def test_tokenizing_the_whole_text_would_merge_newlines(templates: dict[str, Template]) -> None:
    """Parts prevent that the end of LLaMA's header and the start of a response become one token."""
    tokenizer = templates["llama"].tokenizer
    at_once = tokenizer.encode(FAMILIES["llama"].chat.response_start + "\n\nred")
    assert tokenizer.token_name(at_once[3]) == "\u010a" * 4
    header = tokenizer.encode(FAMILIES["llama"].chat.response_start)
    assert at_once[: len(header)] != header


@EACH_FAMILY
def test_truncation_keeps_the_end_of_the_family(family: str, templates: dict[str, Template]) -> None:
    whole = templates[family].render_conversation(DIALOGUE)
    assert whole is not None
    for cut in range(1, len(supervised(whole)) + 20):
        short = replace(templates[family], max_text_tokens=len(whole.token_ids) - (NUM_LATENTS - 1) - cut)
        sample = short.render_conversation(DIALOGUE)
        if sample is None:
            break
        assert sample.token_ids[-1] == templates[family].tokenizer.sample_end_id and sample.modality_ids[-1] == RESPONSE
        assert sample.token_ids[-2] != templates[family].tokenizer.turn_end_id
        assert sample.token_ids[:-1] == whole.token_ids[: len(sample.token_ids) - 1]


@EACH_FAMILY
def test_a_grown_folder_and_a_model_folder_give_the_ids_of_the_published_one(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    vocabulary = grow_tokenizer(folders[family], tmp_path / "grown")
    model = shutil.copytree(folders[family], tmp_path / "model")
    (model / "config.json").write_text(json.dumps({"model_type": family}))
    texts = ["".join(text for text, _ in DIALOGUES[family]), *SENTENCES, "<image>\n\n x e\u0301 123<|endofchunk|>\n"]
    expected = Tokenizer(folders[family], FAMILIES[family].chat)
    if family != "phi3":  # whose published rules put a space before text
        as_written = tokenizers.Tokenizer.from_file(str(tmp_path / "grown/tokenizer.json"))
        assert [as_written.encode(text, add_special_tokens=False).ids for text in texts] == [
            expected.encode(text) for text in texts
        ]
    for folder in (tmp_path / "grown", model):
        other = Tokenizer(folder, FAMILIES[family].chat)
        assert [other.encode(text) for text in texts] == [expected.encode(text) for text in texts]
        for own in (other, expected):
            found = (own.eos_id, own.pad_id, own.image_id, own.endofchunk_id, own.num_tokens)
            v = vocabulary
            assert found == (v.eos_id, v.pad_id, v.image_id, v.endofchunk_id, v.vocab_size + v.num_added_tokens)
    # <pad> is added only where the published tokenizer has no padding token or pads with the end of text
    published = RULES[family].named if family in RULES else {}
    assert expected.token_name(expected.pad_id) == published.get("pad_token", "<pad>")
    sizes = {
        "padded_vocab_size": 640,
        "vocab_size": vocabulary.vocab_size,
        "num_added_tokens": vocabulary.num_added_tokens,
    }
    expected.check_vocabulary(DecoderConfig(family=family, **sizes))


def test_a_base_models_tokenizer_has_the_chat_format_of_an_instruction_models(tmp_path: Path) -> None:
    """It has all special tokens, but another end of text, which is also Qwen's padding token."""
    for family, end in (("qwen2", "<|endoftext|>"), ("llama", "<|end_of_text|>")):
        base = replace(RULES[family], named={**RULES[family].named, "eos_token": end})
        tokenizer = Tokenizer(byte_level(tmp_path / family, base, SENTENCES), FAMILIES[family].chat)
        assert tokenizer.token_name(tokenizer.eos_id) == end and tokenizer.token_name(tokenizer.pad_id) == "<pad>"
        assert tokenizer.token_name(tokenizer.sample_end_id) == FAMILIES[family].chat.turn_end
        assert tokenizer.stop_ids == {tokenizer.eos_id, tokenizer.turn_end_id}


def test_a_tokenizer_of_another_family_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lacks the special tokens <\|begin_of_text\|>, .*of the family model.decoder"):
        Tokenizer(folders["qwen2"], FAMILIES["llama"].chat)
    with pytest.raises(DataError, match=r"lacks the special tokens <s>, <\|system\|>, <\|user\|>, <\|assistant\|>"):
        Tokenizer(folders["qwen3"], FAMILIES["phi3"].chat)
    endless = replace(RULES["qwen2"], named={"tokenizer_class": "Qwen2Tokenizer", "eos_token": None})
    with pytest.raises(DataError, match="names no end-of-text token"):
        Tokenizer(byte_level(tmp_path / "endless", endless), FAMILIES["qwen2"].chat)


@EACH_FAMILY
def test_token_bytes(family: str, templates: dict[str, Template]) -> None:
    tokenizer = templates[family].tokenizer
    text = " The red cat,\n\tcaf\u00e9 \u4e16 12<|endofchunk|>"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert [tokenizer.is_special(token) for token in ids] == [False] * (len(ids) - 1) + [True]
