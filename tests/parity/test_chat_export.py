"""The exported processor gives every family the ids and modality ids that its template trains with."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from chat_folders import chat_folder
from exported_aki import LATENTS, config, open_processor
from PIL import Image

from aki_megatron.checkpoint.hf_export import write_processor
from aki_megatron.checkpoint.processing_aki import AkiProcessor
from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.config.model import RopeConfig
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.families.registry import FAMILIES
from aki_megatron.types import Conversation, Modality, Turn, image_items

IMAGE = Image.new("RGB", (9, 7))


@dataclass(frozen=True)
class ExportedFamily:
    """A family's training template, and its exported processor."""

    template: Template
    processor: AkiProcessor
    folder: Path


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedFamily:
    root = tmp_path_factory.mktemp(request.param)
    source, out = chat_folder(root / "published", request.param), root / "exported"
    out.mkdir()
    tokenizer = Tokenizer(source, FAMILIES[request.param].chat)
    decoder = {"padded_vocab_size": 640, "vocab_size": tokenizer.image_id, "rope": RopeConfig()}
    assert write_processor(source, config(request.param, **decoder), out) == tokenizer.image_id
    template = Template(tokenizer, {Modality.IMAGE: LATENTS}, 512, SYSTEM_MESSAGE)
    return ExportedFamily(template, open_processor(out), out)


def dialogue(turns: int, *, with_image: bool) -> Conversation:
    """Responses that begin with white space, or with a combining character, are among them."""
    texts = [("What is in the picture?", "\n\nA red box."), ("\nSo?\n", " 12"), ("Why?", "e\u0301")]
    return Conversation("key", tuple(Turn(*text) for text in texts[:turns]), image_items(b"x" if with_image else None))


def messages(conversation: Conversation) -> list[dict[str, object]]:
    """The same messages for transformers, without the last response and without a system message."""
    chat_messages: list[dict[str, object]] = []
    for number, turn in enumerate(conversation.turns):
        image = [{"type": "image"}] if conversation.images and not number else []
        chat_messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.prompt}]})
        chat_messages.append({"role": "assistant", "content": turn.response})
    return chat_messages[:-1]


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("turns", [1, 3])
def test_prompts_and_samples_equal_those_of_training(turns: int, with_image: bool, exported: ExportedFamily) -> None:
    conversation, images = dialogue(turns, with_image=with_image), [IMAGE] * with_image
    prompt, sample = exported.template.render_prompt(conversation), exported.template.render_conversation(conversation)
    assert sample is not None
    written = exported.processor.apply_chat_template(messages(conversation), add_generation_prompt=True)
    parts = [part.text for part in exported.template.conversation_parts(conversation)]
    assert written == "".join(parts[:-1])
    for text, expected in ((written, prompt), ("".join(parts), sample)):
        got = exported.processor(text=text, images=images)
        assert (got["input_ids"], got["modality_ids"]) == ([expected.token_ids], [expected.modality_ids])
    # without the assistant's header nothing is a response
    without_header = exported.processor(text="".join(parts).replace("assistant", "user"), images=images)
    assert Modality.RESPONSE in sample.modality_ids and Modality.RESPONSE not in without_header["modality_ids"][0]


def test_text_before_the_image(exported: ExportedFamily) -> None:
    conversation = dialogue(1, with_image=True)
    template = replace(exported.template, text_first=True)
    prompt = template.render_prompt(conversation)
    text = "".join(part.text for part in template.conversation_parts(conversation)[:-1])
    got = exported.processor(text=text, images=IMAGE)
    assert (got["input_ids"], got["modality_ids"]) == ([prompt.token_ids], [prompt.modality_ids])


def test_generation_stops_where_training_ends_a_response(exported: ExportedFamily) -> None:
    tokenizer = exported.template.tokenizer
    settings = json.loads((exported.folder / "generation_config.json").read_text())
    assert sorted(settings["eos_token_id"]) == sorted(tokenizer.stop_ids)
    assert settings["pad_token_id"] == tokenizer.pad_id and tokenizer.sample_end_id in tokenizer.stop_ids
