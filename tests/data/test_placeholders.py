"""Media where they stand in prompts: several images, several turns, own system messages; prefixes of captions."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_files import image_bytes

from aki_megatron.attention import AttentionMask
from aki_megatron.attention.leak_check import LeakError
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.data.collate import collate
from aki_megatron.data.image import ImageCache
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.sample_stream import MixtureStream, Source
from aki_megatron.errors import DataError
from aki_megatron.types import (
    IGNORE,
    Batch,
    Caption,
    Conversation,
    DecodedImage,
    MediaItem,
    Modality,
    Placeholder,
    Sample,
    Turn,
    image_items,
)

TEXT, RESPONSE, IMAGE = int(Modality.TEXT), int(Modality.RESPONSE), int(Modality.IMAGE)
IMAGE_SIZE, LATENTS = 4, 3


def turn(prompt: str, response: str) -> Turn:
    """A turn whose prompt has an image wherever ``@`` stands."""
    texts = prompt.split("@")
    offsets = [sum(map(len, texts[:number])) for number in range(1, len(texts))]
    return Turn("".join(texts), response, tuple(Placeholder(offset, Modality.IMAGE) for offset in offsets))


def conversation(*turns: Turn, system_message: str | None = None) -> Conversation:
    count = sum(len(one.placeholders) for one in turns)
    media = tuple(item for number in range(count) for item in image_items(image_bytes(number)))
    return Conversation("mine/1", turns, media, system_message)


def rendered(template, given: Conversation) -> str:
    return "".join(part.text for part in template.conversation_parts(given))


def batch_of(sample: Sample) -> Batch:
    return collate([[sample]], pad_id=0, image_size=IMAGE_SIZE)


def mask_of(batch: Batch, rule: str) -> torch.Tensor:
    supervised = batch.targets != IGNORE
    attention = AttentionConfig(rule=rule)
    mask = AttentionMask.build(
        batch.modality_ids, batch.segment_ids, attention, supervised=supervised, image_tokens=LATENTS
    )
    return mask.dense()[0]


DIALOGUE = conversation(
    turn("Compare @ and @ here: @@.", "The second is red."), turn("And now?", "No."), turn("Is it like @?", "Yes.")
)


def test_media_stand_where_their_placeholders_are(make_template) -> None:
    template = make_template(system_message="")
    text = rendered(template, DIALOGUE)
    assert text == (
        "<s> <|user|>\nCompare <image> and <image> here: <image><image>.<|end|>\n<|assistant|>\nThe second is red."
        "<|end|>\n<|user|>\nAnd now?<|end|>\n<|assistant|>\nNo.<|end|>"
        "\n<|user|>\nIs it like <image>?<|end|>\n<|assistant|>\nYes.<|endoftext|>"
    )
    sample = template.render_conversation(DIALOGUE)
    assert sample.media == DIALOGUE.media and sample.modality_ids.count(IMAGE) == 5 * LATENTS
    assert [target for target in sample.targets if target != IGNORE] == [
        token for token, kind in zip(sample.token_ids, sample.modality_ids, strict=True) if kind == RESPONSE
    ]
    prompt = template.render_prompt(DIALOGUE)
    assert prompt.media == DIALOGUE.media and prompt.token_ids == sample.token_ids[: len(prompt.token_ids)]
    assert prompt.modality_ids == sample.modality_ids[: len(prompt.token_ids)]


def test_media_without_placeholders_come_first_each_with_a_newline(make_template) -> None:
    given = replace(DIALOGUE, turns=(Turn("How many?", "2"),), media=DIALOGUE.media[:2])
    assert rendered(make_template(system_message=""), given).startswith(
        "<s> <|user|>\n<image>\n<image>\nHow many?<|end|>"
    )
    text_first = make_template(system_message="", text_first=True)
    assert rendered(text_first, given).startswith("<s> <|user|>\nHow many?\n<image>\n<image><|end|>")
    placed = conversation(turn("@ or @?", "2"), turn("Or @?", "3"))
    assert rendered(text_first, placed).startswith("<s> <|user|>\n or ?\n<image>\n<image><|end|>")
    assert "Or <image>?" in rendered(text_first, placed)


def test_a_sample_may_have_its_own_system_message(make_template) -> None:
    template = make_template(system_message="Be kind.")
    own = conversation(turn("Hi @", "Hello"), system_message="Be brief.")
    assert rendered(template, own).startswith("<s> <|system|>\nBe brief.<|end|>\n<|user|>\nHi <image><|end|>")
    without = conversation(turn("Hi", "Hello"), system_message="")
    assert rendered(template, without).startswith("<s> <|user|>\nHi<|end|>")
    with pytest.raises(DataError, match=r"Sample mine/1: the text '<\|end\|>' contains the special token"):
        template.conversation_parts(replace(own, system_message="<|end|>"))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_placeholders_and_media_that_differ_are_an_error_of_the_sample(count: int, make_template) -> None:
    given = conversation(turn("@ and @", "yes"))
    media = (given.media * 2)[:count]
    expected = {0: "no media", 1: "1 image item", 3: "3 image items"}[count]
    with pytest.raises(DataError, match=f"Sample mine/1 has 2 image items in its prompts but {expected} beside them"):
        make_template().render_conversation(replace(given, media=media))


def test_a_modality_without_an_encoder_is_an_error_of_the_sample(make_template) -> None:
    given = Conversation("mine/2", (Turn("What?", "a beep"),), (MediaItem(Modality.AUDIO, b"x"),))
    with pytest.raises(DataError, match="Sample mine/2 holds media of modality audio, which this model has no encoder"):
        make_template().render_conversation(given)


def test_what_truncation_cuts_off_takes_its_media_with_it(make_template) -> None:
    whole = make_template(system_message="").render_conversation(DIALOGUE)
    kept = set()
    for limit in range(8, len(whole.token_ids)):
        sample = make_template(limit, system_message="").render_conversation(DIALOGUE)
        if sample is not None:
            assert sample.modality_ids.count(IMAGE) == LATENTS * len(sample.media)
            assert sample.media == DIALOGUE.media[: len(sample.media)]
            kept.add(len(sample.media))
    assert kept == {4, 5}  # the first turn is whole or the sample is left out


@pytest.mark.parametrize("rule", ["mma", "mma_general"])
def test_an_image_sees_the_later_prompt_text_of_its_own_turn_only(rule: str, make_template) -> None:
    sample = make_template(system_message="").render_conversation(DIALOGUE)
    decoded = tuple(MediaItem(Modality.IMAGE, DecodedImage(bytes(48), IMAGE_SIZE)) for _ in sample.media)
    batch = batch_of(replace(sample, media=decoded))
    kinds, seen = batch.modality_ids[0].tolist(), mask_of(batch, rule)
    turn_of, number = [], 0
    for before, kind in zip([TEXT, *kinds], kinds, strict=False):
        number += before == RESPONSE and kind != RESPONSE
        turn_of.append(number)
    for i, kind in enumerate(kinds):
        for j in range(i + 1, len(kinds)):
            of_prompt = RESPONSE not in (kind, kinds[j]) and turn_of[i] == turn_of[j]
            ahead = kind == IMAGE and kinds[j] == TEXT if rule == "mma" else kind != kinds[j]
            assert bool(seen[i, j]) == (of_prompt and ahead), (i, j)
    leaking = batch.targets.clone()
    first = kinds.index(IMAGE)
    leaking[0, first] = 7  # a supervised image position is between it and the text that it sees
    with pytest.raises(LeakError):
        mask_of(replace(batch, targets=leaking), rule)


CAPTION = Caption("kale/1", "A red cat sits on a mat of straw and looks at three small birds.", image_bytes(3))


@pytest.mark.parametrize("prefix", [0.0, 0.01, 0.3, 0.5, 0.999])
def test_the_prefix_of_a_caption_is_prompt_and_changes_no_token(prefix: float, make_template) -> None:
    template = make_template(64)
    whole, sample = template.render_caption(CAPTION), template.render_caption(replace(CAPTION, prefix=prefix))
    assert sample.token_ids == whole.token_ids
    num_text = whole.modality_ids.count(RESPONSE) - 2  # without both end markers
    num_prompt = sample.modality_ids.count(TEXT) - whole.modality_ids.count(TEXT)
    assert num_prompt == min(int(prefix * num_text), num_text - 1)
    first = whole.modality_ids.index(RESPONSE)
    assert sample.modality_ids[first : first + num_prompt] == [TEXT] * num_prompt
    decoded = image_items(DecodedImage(bytes(48), IMAGE_SIZE))
    seen = mask_of(batch_of(replace(sample, media=decoded)), "mma")  # raises LeakError for a leak
    image = sample.modality_ids.index(IMAGE)
    assert seen[image, first : first + num_prompt].all() and not seen[image, first + num_prompt :].any()


def test_without_a_prefix_a_prompt_that_is_learnt_leaks(make_template) -> None:
    sample = make_template(64).render_caption(replace(CAPTION, prefix=0.5))
    batch = batch_of(replace(sample, media=image_items(DecodedImage(bytes(48), IMAGE_SIZE))))
    targets = torch.tensor([[*sample.token_ids[1:], IGNORE]])
    with pytest.raises(LeakError):
        mask_of(replace(batch, targets=targets), "mma")


def test_a_truncated_caption_keeps_a_learnt_token(make_template) -> None:
    sample = make_template(8).render_caption(replace(CAPTION, prefix=0.9))
    assert sample.modality_ids.count(RESPONSE) >= 3 and len(sample.token_ids) == 8 - 1 + LATENTS


def test_several_images_are_decoded_and_one_unreadable_one_replaces_the_sample(make_template, tmp_path: Path) -> None:
    items = [conversation(turn("@ and @", f"answer {number}")) for number in range(4)]
    items[2] = replace(items[2], media=(items[2].media[0], MediaItem(Modality.IMAGE, b"no image")))
    stream = MixtureStream(
        {"mine": Source(items)},
        Mixture({"mine": 1.0}, seed=0),
        make_template().render_conversation,
        decoders={Modality.IMAGE: ImageCache(IMAGE_SIZE, max_image_bytes=0)},
    )
    bad = []
    for n in range(16):
        loaded = stream.sample(n)
        bad += loaded.bad_samples
        assert len(loaded.sample.images) == 2 == stream.length(n)[1]
        assert all(isinstance(image, DecodedImage) and image.size == IMAGE_SIZE for image in loaded.sample.images)
    assert bad and all("sample mine/1" in one.reason for one in bad)
    assert stream.sample(0, replace_images=False).sample is not None or bad


def test_media_that_fit_into_no_sequence_are_an_error_of_the_sample(make_template) -> None:
    positions = len(make_template().render_conversation(DIALOGUE).token_ids)
    for limits, text in (
        ({"max_media": 4}, r"Sample mine/1 holds 5 media, more than data\.packing\.max_images=4"),
        ({"max_positions": positions - 1}, f"Sample mine/1 takes {positions} positions with its 5 media"),
    ):
        with pytest.raises(DataError, match=text):
            replace(make_template(), **limits).render_conversation(DIALOGUE)
    fitting = replace(make_template(), max_media=5, max_positions=positions)
    assert fitting.render_conversation(DIALOGUE) is not None
