"""The exported processor gives every family the ids and modality ids that its template trains with."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from chat_folders import chat_folder
from exported_aki import LATENTS, config
from PIL import Image

from aki_megatron.checkpoint.hf_export import write_processor
from aki_megatron.checkpoint.processing_aki import AkiProcessor
from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.config.model import RopeConfig
from aki_megatron.data.chat import CHATS
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.types import Conversation, Modality, Turn

PICTURE = Image.new("RGB", (9, 7))


@dataclass(frozen=True)
class Sides:
    """How a family is trained, and how it is exported."""

    template: Template
    processor: AkiProcessor
    folder: Path


@pytest.fixture(scope="module", params=CHATS)
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    root = tmp_path_factory.mktemp(request.param)
    source, out = chat_folder(root / "published", request.param), root / "exported"
    out.mkdir()
    tokenizer = Tokenizer(source, CHATS[request.param])
    sizes = {"padded_vocab_size": 640, "vocab_size": tokenizer.image, "rope": RopeConfig()}
    assert write_processor(source, config(request.param, **sizes), out) == tokenizer.image
    return Sides(Template(tokenizer, LATENTS, 512, SYSTEM_MESSAGE), AkiProcessor.from_pretrained(out), out)


def dialogue(turns: int, *, pictured: bool) -> Conversation:
    """Answers that begin with white space and with a mark of their own are among them."""
    texts = [("What is in the picture?", "\n\nA red box."), ("\nSo?\n", " 12"), ("Why?", "e\u0301")]
    return Conversation("key", tuple(Turn(*text) for text in texts[:turns]), b"x" if pictured else None)


def messages(given: Conversation) -> list[dict[str, object]]:
    """The same for transformers' chat template, without the last answer and without the system message."""
    spoken: list[dict[str, object]] = []
    for number, turn in enumerate(given.turns):
        image = [{"type": "image"}] if given.image and not number else []
        spoken.append({"role": "user", "content": [*image, {"type": "text", "text": turn.prompt}]})
        spoken.append({"role": "assistant", "content": turn.response})
    return spoken[:-1]


@pytest.mark.parametrize("pictured", [True, False])
@pytest.mark.parametrize("turns", [1, 3])
def test_prompts_and_samples_are_those_of_training(turns: int, pictured: bool, sides: Sides) -> None:
    given, images = dialogue(turns, pictured=pictured), [PICTURE] * pictured
    prompt, sample = sides.template.render_prompt(given), sides.template.render_conversation(given)
    assert sample is not None
    written = sides.processor.apply_chat_template(messages(given), add_generation_prompt=True)
    parts = [part.text for part in sides.template.conversation_parts(given)]
    assert written == "".join(parts[:-1])
    for text, expected in ((written, prompt), ("".join(parts), sample)):
        got = sides.processor(text=text, images=images)
        assert (got["input_ids"], got["modality_ids"]) == ([expected.token_ids], [expected.modality_ids])
    # the negative twin: without the assistant's header nothing is an answer
    forgetful = sides.processor(text="".join(parts).replace("assistant", "user"), images=images)
    assert Modality.RESPONSE in sample.modality_ids and Modality.RESPONSE not in forgetful["modality_ids"][0]


def test_text_before_the_picture(sides: Sides) -> None:
    given = dialogue(1, pictured=True)
    template = replace(sides.template, text_first=True)
    prompt = template.render_prompt(given)
    text = "".join(part.text for part in template.conversation_parts(given)[:-1])
    got = sides.processor(text=text, images=PICTURE)
    assert (got["input_ids"], got["modality_ids"]) == ([prompt.token_ids], [prompt.modality_ids])


def test_generation_ends_where_training_ends_an_answer(sides: Sides) -> None:
    tokenizer = sides.template.tokenizer
    settings = json.loads((sides.folder / "generation_config.json").read_text())
    assert sorted(settings["eos_token_id"]) == sorted(tokenizer.stops)
    assert settings["pad_token_id"] == tokenizer.pad and tokenizer.final in tokenizer.stops
