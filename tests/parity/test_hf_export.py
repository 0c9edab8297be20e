"""Exported folders: every tensor bit for bit, there and back; loaded by transformers alone; a processor like ours."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exported_aki import FAMILIES, LATENTS, config, inputs, load, prompts, random_stage, source_of, write
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint.hf_config import describe_language, describe_vision
from aki_megatron.checkpoint.hf_export import export, export_names, exported_source
from aki_megatron.checkpoint.modeling_aki import IMAGE, PAD, RESPONSE, TEXT
from aki_megatron.checkpoint.processing_aki import AkiProcessor
from aki_megatron.checkpoint.tensors import TensorFact, View, to_native
from aki_megatron.checkpoint.weight_names import language_names, vision_names
from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.config.model import ModelConfig, RopeConfig
from aki_megatron.data.batch import collate
from aki_megatron.data.chat import CHATS
from aki_megatron.data.image import load_image
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.generate import generate
from aki_megatron.types import Conversation, Modality, Turn

TOKENIZER = Path(__file__).parents[1] / "data/phi3_like"
SIZES = {"vocab_size": 512, "padded_vocab_size": 576, "rope": RopeConfig()}
"""Of a decoder for this tokenizer."""


def stock(sizes: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that transformers saves for a random language model and a random encoder, bf16."""
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**describe_language(sizes.decoder)))
    vision = SiglipVisionModel(SiglipVisionConfig(**describe_vision(sizes.vision)))
    tied = ("lm_head.weight",) if sizes.decoder.tie_word_embeddings else ()
    text = {name: tensor.bfloat16() for name, tensor in language.state_dict().items() if name not in tied}
    seen = {name.removeprefix("vision_model."): tensor.bfloat16() for name, tensor in vision.state_dict().items()}
    return text, seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_tensors_go_through_our_model_and_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    sizes = config(family)
    language, vision = stock(sizes)
    stage = random_stage(sizes)
    for tensors, table in (
        (language, language_names(sizes.decoder)),
        (vision, vision_names(sizes.vision, "")),
    ):
        facts = {name: TensorFact(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        theirs = View(facts, {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()})  # type: ignore[misc]
        ours = to_native(theirs, table)
        for name in ours.facts:
            stage.get_parameter(name).copy_(ours.get(name))
    written = load_file(write(stage, tmp_path, dtype=torch.bfloat16) / "model.safetensors")
    expected = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in language.items()}
    expected |= {f"model.vision_tower.{name}": tensor for name, tensor in vision.items()}
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    others = {re.sub(r"(?<=resampler)\..*", "", name) for name in written.keys() - expected.keys()}
    added = {"lm_head.bias", "lm_head_extra.bias", "model.extra_embedding.weight", "model.resampler"}
    assert others == added | (set() if sizes.decoder.tie_word_embeddings else {"lm_head_extra.weight"})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_folder_comes_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Also when it is cut into several files, and after transformers loaded and saved it."""
    stage = random_stage(config(family))
    first = write(stage, tmp_path / "first", shard_bytes=20_000)
    assert len(list(first.glob("model-*-of-*.safetensors"))) > 2
    load(first).save_pretrained(tmp_path / "second")
    for folder in (first, tmp_path / "second"):
        found = exported_source(folder)
        assert (found.config, found.rule) == (stage.config, "mma")
        own = source_of(stage)
        assert found.source.facts == own.facts
        assert all(torch.equal(found.source.get(name), own.get(name)) for name in own.facts)


def test_rows_precision_and_what_is_refused(tmp_path: Path) -> None:
    stage = random_stage(config("llama"))
    own = source_of(stage)
    rows = export(own, stage.config, "causal", None, tmp_path, dtype=torch.bfloat16)
    assert {row.read[0]: row.wrote for row in rows} == dict(export_names(stage.config))
    assert {row.kind for row in rows if "qkv" in row.read[0]} == {"cut"}
    described = json.loads((tmp_path / "config.json").read_text())
    assert (described["dtype"], described["attention_rule"]) == ("bfloat16", "causal")
    assert load(tmp_path).dtype == torch.bfloat16
    fewer = View({name: fact for name, fact in own.facts.items() if name != "head.norm.weight"}, own.makers)
    with pytest.raises(CheckpointError, match=r"missing: head.norm.weight"):
        export(fewer, stage.config, "mma", None, tmp_path / "fewer")
    assert not (tmp_path / "fewer").exists()
    with pytest.raises(CheckpointError, match="has 512 \\+ 2 tokens, the model 40 \\+ 2"):
        export(own, stage.config, "mma", TOKENIZER, tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.safetensors")), "gigabytes come last"
    save_file({**load_file(tmp_path / "model.safetensors"), "stray": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="extra: stray"):
        exported_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described | {"model_type": "phi3"}))
    with pytest.raises(CheckpointError, match="model_type=phi3, not aki"):
        exported_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "aki"} | {"vocab_size": 40}))
    with pytest.raises(CheckpointError, match="no num_added_tokens, lm_head_bias"):
        exported_source(tmp_path)


@pytest.mark.parametrize("changed", [{"num_added_tokens": 0}, {"lm_head_bias": False}], ids=str)
def test_models_without_extra_tokens_or_head_bias(changed: dict[str, int], tmp_path: Path) -> None:
    stage = random_stage(config("qwen3", **changed))
    model = load(write(stage, tmp_path))
    assert model.state_dict().keys() == {name for names in export_names(stage.config).values() for name in names}
    rows, pixels = prompts()
    rows = [([min(token, 39) for token in tokens], modality) for tokens, modality in rows]
    with torch.no_grad():
        logits = model(**inputs(rows, torch.cat(pixels))).logits
    assert logits.shape[-1] == stage.config.decoder.total_vocab_size


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that speaks the test tokenizer."""
    return write(random_stage(config("phi3", **SIZES)), tmp_path_factory.mktemp("spoken"), tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def processor(spoken: Path) -> AkiProcessor:
    return AkiProcessor.from_pretrained(spoken)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)).save(path)
    return path


def conversation(picture: Path | None, turns: int = 1) -> Conversation:
    texts = [Turn("What is in the picture?", "A red box."), Turn("And to the left of it?", "Nothing at all.")]
    return Conversation("key", tuple(texts[:turns]), picture)


def messages(given: Conversation) -> list[dict[str, object]]:
    """The same as transformers writes it, without the last answer and without the system message."""
    spoken: list[dict[str, object]] = []
    for number, turn in enumerate(given.turns):
        image = [{"type": "image", "path": str(given.image)}] if given.image and not number else []
        spoken.append({"role": "user", "content": [*image, {"type": "text", "text": turn.prompt}]})
        spoken.append({"role": "assistant", "content": [{"type": "text", "text": turn.response}]})
    return spoken[:-1]


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("pictured", [True, False])
def test_the_processor_writes_what_the_template_writes(
    pictured: bool, turns: int, processor: AkiProcessor, picture: Path
) -> None:
    given = conversation(picture if pictured else None, turns)
    expected = Template(Tokenizer(TOKENIZER, CHATS["phi3"]), LATENTS, 512, SYSTEM_MESSAGE).render_prompt(given)
    text = processor.apply_chat_template(messages(given), add_generation_prompt=True)
    found = processor.apply_chat_template(
        messages(given), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    again = processor(text=text, images=[Image.open(picture)] if pictured else None, return_tensors="pt")
    for got in (found, again):
        assert got["input_ids"].tolist() == [expected.token_ids]
        assert got["modality_ids"].tolist() == [expected.modality_ids]
        assert bool(got["attention_mask"].all())
        assert ("pixel_values" in got) == pictured
        if pictured:
            assert torch.equal(got["pixel_values"], load_image(picture, 12)[None])
    assert (RESPONSE in expected.modality_ids) == (turns > 1)


def test_a_training_text_has_the_modalities_of_a_sample(processor: AkiProcessor, picture: Path) -> None:
    template = Template(Tokenizer(TOKENIZER, CHATS["phi3"]), LATENTS, 512, SYSTEM_MESSAGE)
    given = conversation(picture, 2)
    sample = template.render_conversation(given)
    assert sample is not None
    text = "".join(part.text for part in template.conversation_parts(given))
    got = processor(text=text, images=Image.open(picture))
    assert (got["input_ids"][0], got["modality_ids"][0]) == (sample.token_ids, sample.modality_ids)
    assert [PAD, TEXT, RESPONSE, IMAGE] == [Modality.PAD, Modality.TEXT, Modality.RESPONSE, Modality.IMAGE]


def test_rows_are_padded_on_the_side_that_is_asked_for(processor: AkiProcessor, picture: Path) -> None:
    texts, opened = ["<s><image>one", "<s>two <image> three<image>"], Image.open(picture)
    for side, order in (("left", 1), ("right", -1)):
        got = processor(text=texts, images=[[opened], [opened, opened]], padding_side=side, return_tensors="pt")
        lengths = got["attention_mask"].sum(-1).tolist()
        padding = got["attention_mask"].shape[1] - lengths[0]
        assert padding > 0
        assert got["attention_mask"][0].tolist()[::order] == [0] * padding + [1] * lengths[0]
        assert got["input_ids"][0].tolist()[::order][:padding] == [511] * padding
        assert torch.equal(got["modality_ids"] == PAD, got["attention_mask"] == 0)
        assert got["pixel_values"].shape == (3, 3, 12, 12)
    with pytest.raises(ValueError, match="hold 3 times <image>, but 1 images came"):
        processor(text=texts, images=[opened])
    with pytest.raises(ValueError, match="AkiProcessor has no max_length, truncation"):
        processor(text=texts[0], images=opened, truncation=True, max_length=4)


def test_other_families_write_their_own_markers() -> None:
    """Their conversations, by the chat template that is written into the folder."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    llama = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", "user<|end_header_id|>\n\na")
    qwen = ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\na<|im_end|>\n")
    for family, (begin, user), answer in (
        ("llama", llama, "b<|eot_id|>"),
        ("qwen2", qwen, "b<|im_end|>\n<|im_start|>"),
    ):
        text = tokenizer.apply_chat_template(
            spoken, chat_template=CHATS[family].template(), tokenize=False, add_generation_prompt=True
        )
        assert text.startswith(begin + SYSTEM_MESSAGE)
        assert user in text and CHATS[family].answer_start + answer in text
        assert text.endswith(CHATS[family].answer_start)
        own = tokenizer.apply_chat_template(
            [{"role": "system", "content": "S"}, *spoken], chat_template=CHATS[family].template(), tokenize=False
        )
        assert own.startswith(begin + "S") and SYSTEM_MESSAGE not in own


ALONE = """
import json, sys
sys.modules["aki_megatron"] = None  # importing it would fail
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
folder, picture, text, plain = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=[text, plain], images=[picture], return_tensors="pt")
made = {}
for auto, backend in ((AutoModelForCausalLM, "eager"), (AutoModelForImageTextToText, "sdpa")):
    model = auto.from_pretrained(folder, trust_remote_code=True, attn_implementation=backend)
    for beams in (1, 3):
        tokens = model.generate(**inputs, max_new_tokens=8, num_beams=beams, eos_token_id=None)
        made[f"{backend} {beams}"] = tokens[:, inputs["input_ids"].shape[1]:].tolist()
made["stops"] = model.generation_config.eos_token_id
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
AutoProcessor.from_pretrained(folder + "/again", trust_remote_code=True)
print(json.dumps(made))
"""


def test_transformers_alone_generates_what_we_generate(spoken: Path, picture: Path, tmp_path: Path) -> None:
    """A process that cannot import this package; then what it saved is loaded again there."""
    template = Template(Tokenizer(TOKENIZER, CHATS["phi3"]), LATENTS, 512, SYSTEM_MESSAGE)
    given = [conversation(picture), conversation(None)]
    texts = ["".join(part.text for part in template.conversation_parts(each)[:-1]) for each in given]
    home = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", ALONE, str(spoken), str(picture), *texts],
        capture_output=True,
        text=True,
        timeout=280,
        env=home,
        cwd=tmp_path,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    made = json.loads(ran.stdout.splitlines()[-1])
    stage = random_stage(config("phi3", **SIZES))
    prompts = collate([[template.render_prompt(each)] for each in given], pad_id=511, image_size=12)
    expected = generate(stage, prompts, stop_ids=(), max_new_tokens=8)
    assert made["eager 1"] == made["sdpa 1"] == expected
    assert made["eager 3"] == made["sdpa 3"] != expected
    assert set(made["stops"]) == template.tokenizer.stops
