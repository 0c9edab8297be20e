"""Conversations of several turns with none, two and three images: an exported folder equals the training side.

Its processor and chat template equal our template, its model equals the engine that trains, and both sides generate the
same tokens.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_folders import chat_folder
from exported_aki import LATENTS, config, load, open_processor, random_stage, write
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from aki_megatron.checkpoint.hf_export import EXAMPLE_IMAGE
from aki_megatron.checkpoint.modeling_aki import AkiForConditionalGeneration
from aki_megatron.checkpoint.processing_aki import AkiProcessor
from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.config.model import RopeConfig
from aki_megatron.data.collate import collate
from aki_megatron.data.media import media_decoders
from aki_megatron.data.sources.chat_record import LAYOUTS, conversation, parse_record
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.engine.ddp_stage import DDPStage
from aki_megatron.engine.optimizer import adamw
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.runner import collate_prompts, read_prompt
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage
from aki_megatron.parallel.topology import Launch, init_distributed
from aki_megatron.types import IGNORE, Batch, Conversation, Modality, Turn, image_items, stack_ids

TOLERANCE = 1e-4
"""Of logits and losses, relative to the largest."""
NUM_PICTURES, NEW_TOKENS = 3, 8
Part = str | int
"""A text, or the number of a picture."""

PLACED: dict[str, list[tuple[list[Part], str]]] = {
    "none": [(["Name a color."], "Red."), (["Another?"], "\n\nBlue."), (["And a number?"], "12")],
    "two, each in a turn": [
        ([0, "\nWhat is in the picture?"], "A box."),
        (["And in ", 1, "?"], "A cat."),
        (["So?"], "No"),
    ],
    "two in one prompt": [(["Is ", 2, " larger than ", 0, "?"], "Yes."), (["Why?"], "It is.")],
    "three, at the ends and between": [([1, " is red, ", 0, " is not, and ", 2], "Right."), (["Why?"], "\u0301e")],
    "three, in the last turn too": [(["Hello\n", 0, "\n", 1, "\nthere"], "Hi."), (["Now ", 2], "A dish.")],
    "two, before text that begins with a space": [([0, 1, " are they equal?"], "No."), (["\nWhy?\n"], " 12")],
    "nothing but pictures": [([2, 0], "A box and a cat."), ([1], "A dish.")],
}
"""Questions as parts, as users' own files hold them (format messages), and their answers."""

BEFORE = {"none before": [], "two before": [1, 0], "three before": [2, 1, 0]}
"""Pictures in front of the first question, in AKI's format, as the public datasets have them."""


@dataclass(frozen=True)
class Case:
    """A conversation as training reads it, and as messages for transformers."""

    conversation: Conversation
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class ExportedModel:
    """A model, its training template and what to-hf writes of it."""

    stage: Stage
    template: Template
    processor: AkiProcessor
    model: AkiForConditionalGeneration
    pictures: list[Path]

    def cases(self) -> list[Case]:
        return [*map(self._placed, PLACED), *map(self._before, BEFORE)]

    def _placed(self, name: str) -> Case:
        """Training reads the very messages that transformers gets, as a record of a user's own files."""
        messages: list[dict[str, Any]] = []
        for question, answer in PLACED[name]:
            content = [self._part(part) for part in question]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        record = parse_record({"messages": messages}, LAYOUTS["messages"])
        return Case(conversation(record, name, [self.pictures[0].parent]), messages[:-1])

    def _part(self, part: Part) -> dict[str, str]:
        return {"type": "text", "text": part} if isinstance(part, str) else self._image(part)

    def _image(self, number: int) -> dict[str, str]:
        return {"type": "image", "path": str(self.pictures[number])}

    def _before(self, name: str) -> Case:
        turns = (
            Turn("What is in the pictures?", "A box."),
            Turn("And to the left of it?", "Nothing."),
            Turn("So?", ""),
        )
        media = [item for number in BEFORE[name] for item in image_items(self.pictures[number])]
        messages: list[dict[str, Any]] = []
        for number, turn in enumerate(turns):
            images = [self._image(picture) for picture in BEFORE[name] if number == 0]
            messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.prompt}]})
            messages.append({"role": "assistant", "content": turn.response})
        return Case(Conversation(name, turns, tuple(media)), messages[:-1])

    def inputs(self, messages: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """What the folder's processor makes of conversations, padded on the left."""
        return dict(
            self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        )


@pytest.fixture(scope="module", params=["phi3", "qwen2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """Of Phi-3's chat markers newlines vanish, of the others they stay."""
    root = tmp_path_factory.mktemp(request.param)
    source = chat_folder(root / "published", request.param)
    tokenizer = Tokenizer(source, FAMILIES[request.param].chat)
    sizes = {"padded_vocab_size": 640, "vocab_size": tokenizer.image_id, "rope": RopeConfig()}
    stage = random_stage(config(request.param, **sizes))
    folder = write(stage, root / "exported", tokenizer=source)
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_PICTURES, 15, 20, 3), dtype=np.uint8)
    pictures = [folder.with_name(f"{number}.png") for number in range(NUM_PICTURES)]
    for path, picture in zip(pictures, pixels, strict=True):
        Image.fromarray(picture).save(path)
    assert (folder / EXAMPLE_IMAGE).is_file()
    template = Template(tokenizer, {Modality.IMAGE: LATENTS}, 512, SYSTEM_MESSAGE)
    return ExportedModel(stage, template, open_processor(folder), load(folder), pictures)


def test_the_processor_gives_what_training_reads(exported: ExportedModel) -> None:
    decoders = media_decoders(exported.stage.config)
    for case in exported.cases():
        text = "".join(part.text for part in exported.template.conversation_parts(case.conversation)[:-1])
        written = exported.processor.apply_chat_template(case.messages, add_generation_prompt=True, tokenize=False)
        assert written == text, case.conversation.key
        got = exported.inputs([case.messages])
        prompt = read_prompt(case.conversation, exported.template, decoders)
        assert got["input_ids"].tolist() == [prompt.token_ids] and got["modality_ids"].tolist() == [prompt.modality_ids]
        assert len(prompt.media) == len(case.conversation.media) == prompt.modality_ids.count(Modality.IMAGE) / LATENTS
        pixels = collate_prompts([prompt], exported.template, 12).media[Modality.IMAGE]
        assert torch.equal(got.get("pixel_values", torch.zeros(0, 3, 12, 12)), pixels), case.conversation.key


def answered(cases: list[Case], exported: ExportedModel) -> Batch:
    """The whole conversations as a micro-batch of training, every answer supervised."""
    decoders = media_decoders(exported.stage.config)
    samples = []
    for case in cases:
        sample = exported.template.render_conversation(case.conversation)
        assert sample is not None
        media = read_prompt(case.conversation, exported.template, decoders).media
        samples.append([replace(sample, media=media)])
    return collate(samples, pad_id=exported.template.tokenizer.pad_id, image_size=12)


def engine_outcome(stage: Stage, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> tuple[float, list[int]]:
    """The loss of a micro-batch, and the likeliest token at each position with a target, in a world of this process."""
    for name, value in {"LOCAL_RANK": "0", "LOCAL_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)  # what init_distributed sets is gone after the test
    launch = Launch(rank=0, local_rank=0, world_size=1, local_world_size=1, launcher="python", master_port=0)
    topology = init_distributed(launch, tensor=1, pipeline=1)
    try:
        optimizer = adamw(stage, weight_decay=0.0, beta1=0.9, beta2=0.9, eps=1e-8)
        engine = PipelineEngine(
            [DDPStage(stage, topology, optimizer)],
            topology,
            num_microbatches=1,
            precision="fp32",
            max_grad_norm=1.0,
            mask_check_interval=1,
        )
        (loss,), (tokens,) = engine.forward_losses([batch]), engine.next_tokens([batch])
    finally:
        topology.shutdown()
    return loss, tokens


def test_the_model_computes_what_the_engine_trains(exported: ExportedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case for case in exported.cases() if case.conversation.turns[-1].response]
    batch = answered(cases, exported)
    loss, tokens = engine_outcome(exported.stage, batch, monkeypatch)
    texts = ["".join(part.text for part in exported.template.conversation_parts(case.conversation)) for case in cases]
    pictures = [image for case in cases for image in case.conversation.images]
    inputs = exported.processor(text=texts, images=pictures, padding_side="right", return_tensors="pt")
    assert torch.equal(inputs["input_ids"], batch.token_ids)
    with torch.no_grad():
        found = exported.model(**inputs).logits
        ours = exported.stage.logits(batch.token_ids, stack_ids(batch), batch.media)[..., : found.shape[-1]]
    valid, supervised = batch.modality_ids != Modality.PAD, batch.targets != IGNORE
    scale = float(ours[valid].abs().max())
    assert float((found[valid] - ours[valid]).abs().max()) <= TOLERANCE * scale
    assert found[supervised].argmax(dim=-1).tolist() == tokens and len(set(tokens)) > 5
    summed = float(cross_entropy(found[supervised], batch.targets[supervised], reduction="sum"))
    assert summed == pytest.approx(loss, rel=TOLERANCE)
    with torch.no_grad():
        swapped = exported.model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert float((swapped[valid] - ours[valid]).abs().max()) > 100 * TOLERANCE * scale, "the order of images matters"


def test_both_sides_generate_the_same_tokens(exported: ExportedModel) -> None:
    cases, decoders = exported.cases(), media_decoders(exported.stage.config)
    prompts = [read_prompt(case.conversation, exported.template, decoders) for case in cases]
    expected = generate(
        exported.stage, collate_prompts(prompts, exported.template, 12), stop_ids=(), max_new_tokens=NEW_TOKENS
    )
    inputs = exported.inputs([case.messages for case in cases])
    generated = exported.model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert generated[:, inputs["input_ids"].shape[1] :].tolist() == expected
    assert len({tuple(tokens) for tokens in expected}) > len(cases) // 2, "the prompts matter"
