"""Golden rendered text, spans and targets of every format; truncation; several turns; refused text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.data.template import MIN_TEXT_TOKENS, Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.types import IGNORE, Caption, Conversation, Modality, Sample, Turn, image_items

SYSTEM_BLOCK = f"<s> <|system|>\n{SYSTEM_MESSAGE}<|end|>\n<|user|>\n"
TEXT, RESPONSE, IMAGE = int(Modality.TEXT), int(Modality.RESPONSE), int(Modality.IMAGE)


def ask(prompt: str, response: str, image: bytes | None = b"x") -> Conversation:
    return Conversation("vqav2/count/7", (Turn(prompt, response),), image_items(image))


def supervised(sample: Sample) -> list[int]:
    return [target for target in sample.targets if target != IGNORE]


def check_targets(sample: Sample) -> None:
    """Every RESPONSE token is the target of the position before it, and nothing else is a target."""
    following = list(zip(sample.token_ids[1:], sample.modality_ids[1:], strict=True))
    assert sample.targets == [token if kind == RESPONSE else IGNORE for token, kind in following] + [IGNORE]


def test_fine_tuning_text_is_the_papers(make_template) -> None:
    template = make_template()
    parts = template.conversation_parts(ask("Answer the question using a single word or phrase. How many?", "3"))
    assert "".join(part.text for part in parts) == (
        SYSTEM_BLOCK + "<image>\nAnswer the question using a single word or phrase. How many?<|end|>\n"
        "<|assistant|>\n3<|endoftext|>"
    )
    assert [part.modality for part in parts] == [TEXT, IMAGE, TEXT, RESPONSE]
    text_only = template.conversation_parts(ask("What is 12?", "12", image=None))
    assert "".join(part.text for part in text_only) == (
        SYSTEM_BLOCK + "What is 12?<|end|>\n<|assistant|>\n12<|endoftext|>"
    )


def test_fine_tuning_spans_and_targets(make_template, tokenizer: Tokenizer) -> None:
    template: Template = make_template()
    sample = template.render_conversation(ask("What color is the cat?", "red"))
    assert sample is not None
    names = [tokenizer.token_name(token) for token in sample.token_ids]
    answer = tokenizer.encode("red")
    at = names.index("<image>")
    assert names[:3] == ["<s>", "\u2581", "<|system|>"] and names[at - 1] == "<|user|>"
    assert names[at : at + 4] == ["<image>"] * 3 + ["<0x0A>"]  # 3 latents; the newline is a token of its own
    end = len(names) - len(answer) - 1
    assert names[end - 2 : end] == ["<|end|>", "<|assistant|>"]  # the newline after <|assistant|> is gone
    expected = [TEXT] * at + [IMAGE] * 3 + [TEXT] * (end - at - 3) + [RESPONSE] * (len(answer) + 1)
    assert sample.modality_ids == expected
    assert supervised(sample) == [*answer, tokenizer.eos_id]
    assert sample.targets[end - 1] == answer[0]  # <|assistant|> predicts the first token of the answer
    check_targets(sample)


def test_caption_text_spans_and_targets(make_template, tokenizer: Tokenizer) -> None:
    template: Template = make_template()
    caption = Caption("captions/0/1", "  The red cat.\n", b"x")
    assert "".join(part.text for part in template.caption_parts(caption)) == (
        "<s><image>The red cat.<|endofchunk|><|endoftext|>"
    )
    sample = template.render_caption(caption)
    assert sample is not None
    text = tokenizer.encode("The red cat.")
    assert sample.token_ids == [
        tokenizer.token_id("<s>"),
        *[tokenizer.image_id] * 3,
        *text,
        tokenizer.endofchunk_id,
        tokenizer.eos_id,
    ]
    assert sample.modality_ids == [TEXT] + [IMAGE] * 3 + [RESPONSE] * (len(text) + 2)
    # the last image position predicts the first token of the caption
    assert sample.targets == [IGNORE] * 3 + [*text, tokenizer.endofchunk_id, tokenizer.eos_id, IGNORE]


WORDS = st.lists(
    st.sampled_from(["The", " red", " cat", "\n", " ", "12", "\u4e16", "a", "0.333", "?"]), min_size=1, max_size=9
).map("".join)


@given(prompts=st.lists(WORDS, min_size=1, max_size=3), responses=st.lists(WORDS, min_size=3, max_size=3))
def test_tokens_of_parts_are_those_of_the_whole_string(
    make_session_template, tokenizer: Tokenizer, prompts: list[str], responses: list[str]
) -> None:
    """How many each part has, by tokenizing ever longer prefixes of the string; here every part ends in a marker."""
    template: Template = make_session_template
    turns = tuple(Turn(prompt, response) for prompt, response in zip(prompts, responses, strict=False))
    conversation = Conversation("key", turns, image_items(b"x"))
    prefix, modalities = "", []
    for part in template.conversation_parts(conversation):
        prefix += part.text
        tokens = len(tokenizer.encode(prefix))
        modalities += [int(part.modality)] * (tokens - len(modalities))
    at = modalities.index(IMAGE)
    modalities[at:at] = [IMAGE] * 2
    sample = template.render_conversation(conversation)
    if sample is None:
        assert not any(response.strip() for _, response in zip(prompts, responses, strict=False))
        return
    assert sample.modality_ids == modalities
    ids = tokenizer.encode(prefix)
    assert sample.token_ids == [*ids[:at], *[tokenizer.image_id] * 3, *ids[at + 1 :]]
    check_targets(sample)


def test_several_turns_supervise_responses_only(make_template, tokenizer: Tokenizer) -> None:
    template: Template = make_template(system_message="")
    turns = (Turn("What color?", "red"), Turn("How many?", "12"))
    conversation = Conversation("llava/1", turns, image_items(b"x"))
    assert "".join(part.text for part in template.conversation_parts(conversation)) == (
        "<s> <|user|>\n<image>\nWhat color?<|end|>\n<|assistant|>\nred<|end|>\n"
        "<|user|>\nHow many?<|end|>\n<|assistant|>\n12<|endoftext|>"
    )
    sample = template.render_conversation(conversation)
    assert sample is not None
    red, twelve = (tokenizer.encode(text) for text in ("red", "12"))
    assert supervised(sample) == [*red, tokenizer.turn_end_id, *twelve, tokenizer.eos_id]
    prompt = template.render_prompt(conversation)
    assert prompt.token_ids == sample.token_ids[: -len(twelve) - 1]
    assert prompt.modality_ids == sample.modality_ids[: -len(twelve) - 1]  # the first answer is still a RESPONSE
    assert set(prompt.targets) == {IGNORE}


def test_prompt_is_the_training_sample_up_to_the_assistant_marker(make_template, tokenizer: Tokenizer) -> None:
    template: Template = make_template()
    conversation = ask("What color is the cat?", "red")
    prompt, sample = template.render_prompt(conversation), template.render_conversation(conversation)
    assert sample is not None
    assert prompt.token_ids == sample.token_ids[: len(prompt.token_ids)]
    assert prompt.token_ids[-1] == tokenizer.token_id("<|assistant|>")
    assert sample.modality_ids[len(prompt.token_ids) :] == [RESPONSE] * len(supervised(sample))


def length(sample: Sample) -> int:
    """Text tokens: the positions of the image count as one."""
    return len(sample.token_ids) - (2 if IMAGE in sample.modality_ids else 0)


def test_truncation_keeps_the_end_marker(make_template, tokenizer: Tokenizer) -> None:
    conversation = ask("What color is the cat?", "red blue green white black")
    whole = make_template().render_conversation(conversation)
    assert whole is not None
    answer = len(supervised(whole)) - 1
    for cut in range(answer):
        template = make_template(max_text_tokens=length(whole) - cut)
        sample = template.render_conversation(conversation)
        assert sample is not None and length(sample) == template.max_text_tokens
        assert supervised(sample) == [*supervised(whole)[: answer - cut], tokenizer.eos_id]
        check_targets(sample)
    # nothing but the end marker would be supervised, then not even that
    for cut in range(answer, length(whole) - MIN_TEXT_TOKENS):
        assert make_template(max_text_tokens=length(whole) - cut).render_conversation(conversation) is None


def test_truncated_caption_keeps_both_end_markers(make_template, tokenizer: Tokenizer) -> None:
    sample = make_template(max_text_tokens=6).render_caption(Caption("key", "The red cat is beside the dog", b"x"))
    assert sample is not None and length(sample) == 6
    text = tokenizer.encode("The red cat")[:2]
    assert supervised(sample) == [*text, tokenizer.endofchunk_id, tokenizer.eos_id]


def test_truncation_inside_a_later_prompt_ends_after_the_last_response(make_template, tokenizer: Tokenizer) -> None:
    turns = (Turn("What color?", "red"), Turn("How many cats are there? " * 20, "12"))
    sample = make_template(60, system_message="").render_conversation(Conversation("key", turns, image_items(b"x")))
    assert sample is not None
    assert supervised(sample) == [*tokenizer.encode("red"), tokenizer.eos_id]
    assert sample.modality_ids[-1] == RESPONSE
    check_targets(sample)


def test_a_length_too_short_for_text_is_refused(make_template) -> None:
    with pytest.raises(ConfigError, match="max_text_tokens=4 leaves no room"):
        make_template(max_text_tokens=4)


def test_a_sample_without_supervised_tokens_is_none(make_template) -> None:
    assert make_template().render_conversation(ask("What?", " \n")) is None
    assert make_template().render_caption(Caption("key", "  ", b"x")) is None


@pytest.mark.parametrize("text", ["an <image> in words", "x<|end|>", "</s>", "<pad>", "<|placeholder3|>"])
def test_text_that_holds_a_special_token_is_refused(make_template, text: str) -> None:
    for conversation in (ask(text, "red"), ask("What?", text)):
        with pytest.raises(DataError, match=r"Sample vqav2/count/7: .* contains the special token <"):
            make_template().render_conversation(conversation)
    with pytest.raises(DataError, match="special token"):
        make_template().render_caption(Caption("key", text, b"x"))


def test_boxes_are_plain_text(make_template) -> None:
    assert make_template().render_conversation(ask("<bbox>[0.000, 0.333][0.250, 1.000]</bbox>", "red")) is not None


def test_text_first_puts_the_image_after_the_question(make_template, tokenizer: Tokenizer) -> None:
    template: Template = make_template(text_first=True)
    conversation = ask("How many?", "3")
    assert "".join(part.text for part in template.conversation_parts(conversation)) == (
        SYSTEM_BLOCK + "How many?\n<image><|end|>\n<|assistant|>\n3<|endoftext|>"
    )
    sample = template.render_conversation(conversation)
    assert sample is not None
    assert sorted(sample.token_ids) == sorted(make_template().render_conversation(conversation).token_ids)
    assert sample.modality_ids.index(IMAGE) > sample.token_ids.index(tokenizer.encode("How")[-1])
    check_targets(sample)
    dialogue = Conversation("a/b/1", (Turn("How many?", "3"), Turn("Sure?", "yes")), image_items(b"x"))
    text = "".join(part.text for part in template.conversation_parts(dialogue))
    assert text.count("<image>") == 1 and text.endswith(
        "3<|end|>\n<|user|>\nSure?<|end|>\n<|assistant|>\nyes<|endoftext|>"
    )
    assert template.render_conversation(ask("What is 12?", "12", image=None)) == make_template().render_conversation(
        ask("What is 12?", "12", image=None)
    )


def test_text_first_captions_come_before_the_image(make_template, tokenizer: Tokenizer) -> None:
    template: Template = make_template(text_first=True)
    caption = Caption("captions/0/1", "The red cat.", b"x")
    text = tokenizer.encode("The red cat.")
    sample = template.render_caption(caption)
    assert sample is not None
    assert sample.token_ids == [
        tokenizer.token_id("<s>"),
        *text,
        *[tokenizer.image_id] * 3,
        tokenizer.endofchunk_id,
        tokenizer.eos_id,
    ]
    assert supervised(sample) == [*text, tokenizer.endofchunk_id, tokenizer.eos_id]
    check_targets(sample)
    short = make_template(MIN_TEXT_TOKENS, text_first=True).render_caption(caption)
    assert short is not None
    assert short.token_ids == [
        tokenizer.token_id("<s>"), text[0], *[tokenizer.image_id] * 3, tokenizer.endofchunk_id, tokenizer.eos_id
    ]  # fmt: skip


def test_a_system_message_with_a_special_token_is_refused(make_template) -> None:
    for text in ("Be kind.<|end|>", "<|user|>\nHi", "<image>", "<unk>"):
        with pytest.raises(ConfigError, match=r"data\.system_message contains the special token <"):
            make_template(system_message=text)
    make_template(system_message="1 < 2 | 3 > 2")


def test_what_data_may_not_hold_a_system_message_may_not_hold_either(make_template) -> None:
    for text in ("Be kind.<|end|>", "half \ud83d of a pair"):
        with pytest.raises(DataError) as in_data:
            make_template().render_conversation(ask(text, "red"))
        with pytest.raises(ConfigError) as in_system_message:
            make_template(system_message=text)
        reason = str(in_system_message.value).removeprefix("data.system_message ").partition(";")[0]
        assert reason in str(in_data.value)


def test_a_byte_order_mark_before_the_system_message_is_no_part_of_it(make_template) -> None:
    marked, plain = make_template(system_message="\ufeffBe kind."), make_template(system_message="Be kind.")
    assert marked.conversation_parts(ask("What?", "red")) == plain.conversation_parts(ask("What?", "red"))


def test_a_sample_says_by_how_much_it_was_cut(make_template) -> None:
    dialogue = Conversation(
        "a/b/1", tuple(Turn("How many cats?", "three of them") for _ in range(9)), image_items(b"x")
    )
    whole = make_template().render_conversation(dialogue)
    caption = Caption("key", "red cat " * 40, b"x")
    whole_caption = make_template().render_caption(caption)
    assert whole.num_cut_tokens == whole_caption.num_cut_tokens == 0
    for cap in range(len(whole.token_ids) - 40, len(whole.token_ids) - 3):
        cut = make_template(max_text_tokens=cap).render_conversation(dialogue)
        assert len(cut.token_ids) + cut.num_cut_tokens == len(whole.token_ids) and cut.num_cut_tokens > 0
    cut = make_template(max_text_tokens=20).render_caption(caption)
    assert len(cut.token_ids) + cut.num_cut_tokens == len(whole_caption.token_ids) and cut.num_cut_tokens > 0
