"""Exported folders: bit-identical tensors in both directions, transformers alone, and a processor equal to training."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_aki import (
    DECODERS,
    LATENTS,
    config,
    inputs,
    load,
    open_processor,
    prompts,
    random_stage,
    source_of,
    write,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint.hf_config import language_config_json, vision_config_json
from aki_megatron.checkpoint.hf_export import export, export_names, exported_source
from aki_megatron.checkpoint.modeling_aki import IMAGE, PAD, RESPONSE, TEXT
from aki_megatron.checkpoint.processing_aki import AkiProcessor
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec, to_native
from aki_megatron.checkpoint.weight_names import language_names, vision_names
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.config.model import ModelConfig, RopeConfig
from aki_megatron.data.collate import collate
from aki_megatron.data.image import decode_image, normalize
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.evaluate.generate import generate
from aki_megatron.families.registry import FAMILIES
from aki_megatron.types import Conversation, Modality, Turn, image_items

TOKENIZER = Path(__file__).parents[1] / "data/phi3_like"
SIZES = {"vocab_size": 512, "padded_vocab_size": 576, "rope": RopeConfig()}
"""Decoder sizes for this tokenizer."""


def stock(model_config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that transformers saves for a random language model and a random encoder, bf16."""
    torch.manual_seed(0)
    language = AutoModelForCausalLM.from_config(AutoConfig.for_model(**language_config_json(model_config.decoder)))
    vision = SiglipVisionModel(SiglipVisionConfig(**vision_config_json(model_config.vision)))
    tied = ("lm_head.weight",) if model_config.decoder.tie_word_embeddings else ()
    text = {name: tensor.bfloat16() for name, tensor in language.state_dict().items() if name not in tied}
    visual = {name.removeprefix("vision_model."): tensor.bfloat16() for name, tensor in vision.state_dict().items()}
    return text, visual


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_stock_tensors_go_through_our_model_and_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    model_config = config(family)
    language, vision = stock(model_config)
    stage = random_stage(model_config)
    for tensors, table in (
        (language, language_names(model_config.decoder)),
        (vision, vision_names(model_config.vision, "")),
    ):
        specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        external = LazyTensors(specs, {name: lambda tensor=tensor: tensor for name, tensor in tensors.items()})  # type: ignore[misc]
        native = to_native(external, table)
        for name in native.specs:
            stage.get_parameter(name).copy_(native.get(name))
    written = load_file(write(stage, tmp_path, dtype=torch.bfloat16) / "model.safetensors")
    expected = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in language.items()}
    expected |= {f"model.vision_tower.{name}": tensor for name, tensor in vision.items()}
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    others = {re.sub(r"(?<=resampler)\..*", "", name) for name in written.keys() - expected.keys()}
    added = {"lm_head.bias", "lm_head_added.bias", "model.added_embedding.weight", "model.resampler"}
    assert others == added | (set() if model_config.decoder.tie_word_embeddings else {"lm_head_added.weight"})


@pytest.mark.parametrize("family", DECODERS)
def test_an_exported_folder_is_read_back_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Also from several files, and after transformers loaded and saved it."""
    stage = random_stage(config(family))
    first = write(stage, tmp_path / "first", shard_bytes=20_000)
    assert len(list(first.glob("model-*-of-*.safetensors"))) > 2
    load(first).save_pretrained(tmp_path / "second")
    for folder in (first, tmp_path / "second"):
        found = exported_source(folder)
        assert (found.config, found.rule) == (stage.config, "mma")
        source = source_of(stage)
        assert found.source.specs == source.specs
        assert all(torch.equal(found.source.get(name), source.get(name)) for name in source.specs)


def test_precision_and_what_is_refused(tmp_path: Path) -> None:
    stage = random_stage(config("llama"))
    source, mma = source_of(stage), AttentionConfig(rule="mma")
    export(source, stage.config, AttentionConfig(rule="causal"), None, tmp_path, dtype=torch.bfloat16)
    exported = load_file(tmp_path / "model.safetensors")
    assert exported.keys() == {name for names in export_names(stage.config).values() for name in names}
    config_json = json.loads((tmp_path / "config.json").read_text())
    assert (config_json["dtype"], config_json["attention_rule"]) == ("bfloat16", "causal")
    assert load(tmp_path).dtype == torch.bfloat16
    specs = {name: spec for name, spec in source.specs.items() if name != "lm_head.norm.weight"}
    incomplete = LazyTensors(specs, source.getters)
    with pytest.raises(CheckpointError, match=r"missing: lm_head.norm.weight"):
        export(incomplete, stage.config, mma, None, tmp_path / "incomplete")
    assert not (tmp_path / "incomplete").exists()
    with pytest.raises(CheckpointError, match="has 512 \\+ 2 tokens, the model 40 \\+ 2"):
        export(source, stage.config, mma, TOKENIZER, tmp_path / "other")
    assert not list((tmp_path / "other").glob("*.safetensors")), "weights are written last"
    save_file({**load_file(tmp_path / "model.safetensors"), "stray": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: stray"):
        exported_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_json | {"model_type": "phi3"}))
    with pytest.raises(CheckpointError, match="model_type=phi3, not aki"):
        exported_source(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "aki", "base_vocab_size": 40}))
    with pytest.raises(CheckpointError, match="no num_added_tokens, lm_head_bias"):
        exported_source(tmp_path)


def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    folder = write(random_stage(config("phi3")), tmp_path)
    config_json = json.loads((folder / "config.json").read_text())
    config_json["base_tokens"] = config_json.pop("base_vocab_size")
    (folder / "config.json").write_text(json.dumps(config_json))
    with pytest.raises(CheckpointError, match="an earlier version wrote.*Export its checkpoint again: .* to-hf"):
        exported_source(folder)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"rule": "mma_general"}, "attention.rule=mma_general cannot be exported"),
        ({"rule": "cca"}, "attention.rule=cca cannot be exported"),
        ({"rule": "mma", "visible_fraction": 0.5}, "attention.visible_fraction=0.5 cannot be exported"),
    ],
)
def test_an_attention_rule_that_the_modelling_file_lacks_is_refused(
    attention: dict[str, Any], message: str, tmp_path: Path
) -> None:
    stage = random_stage(config("phi3"))
    with pytest.raises(ConfigError, match=message):
        export(source_of(stage), stage.config, AttentionConfig(**attention), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [{"num_added_tokens": 0}, {"lm_head_bias": False}], ids=str)
def test_models_without_added_tokens_or_lm_head_bias(changed: dict[str, int], tmp_path: Path) -> None:
    stage = random_stage(config("qwen3", **changed))
    model = load(write(stage, tmp_path))
    assert model.state_dict().keys() == {name for names in export_names(stage.config).values() for name in names}
    texts, pixels = prompts()
    texts = [([min(token, 39) for token in tokens], modality) for tokens, modality in texts]
    with torch.no_grad():
        logits = model(**inputs(texts, torch.cat(pixels))).logits
    assert logits.shape[-1] == stage.config.decoder.total_vocab_size


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model with the test tokenizer."""
    return write(random_stage(config("phi3", **SIZES)), tmp_path_factory.mktemp("exported"), tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def processor(exported: Path) -> AkiProcessor:
    return open_processor(exported)


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image_path") / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (31, 17, 3), dtype=np.uint8)).save(path)
    return path


def conversation(image_path: Path | None, turns: int = 1) -> Conversation:
    texts = [Turn("What is in the picture?", "A red box."), Turn("And to the left of it?", "Nothing at all.")]
    return Conversation("key", tuple(texts[:turns]), image_items(image_path))


def messages(dialogue: Conversation) -> list[dict[str, object]]:
    """The same messages for transformers, without the last response and without a system message."""
    chat_messages: list[dict[str, object]] = []
    for number, turn in enumerate(dialogue.turns):
        image = [{"type": "image", "path": str(dialogue.images[0])}] if dialogue.images and not number else []
        chat_messages.append({"role": "user", "content": [*image, {"type": "text", "text": turn.prompt}]})
        chat_messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.response}]})
    return chat_messages[:-1]


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("with_image", [True, False])
def test_the_processor_writes_what_the_template_writes(
    with_image: bool, turns: int, processor: AkiProcessor, image_path: Path
) -> None:
    dialogue = conversation(image_path if with_image else None, turns)
    template = Template(Tokenizer(TOKENIZER, FAMILIES["phi3"].chat), {Modality.IMAGE: LATENTS}, 512, SYSTEM_MESSAGE)
    expected = template.render_prompt(dialogue)
    text = processor.apply_chat_template(messages(dialogue), add_generation_prompt=True)
    found = processor.apply_chat_template(
        messages(dialogue), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    again = processor(text=text, images=[Image.open(image_path)] if with_image else None, return_tensors="pt")
    for got in (found, again):
        assert got["input_ids"].tolist() == [expected.token_ids]
        assert got["modality_ids"].tolist() == [expected.modality_ids]
        assert bool(got["attention_mask"].all())
        assert ("pixel_values" in got) == with_image
        if with_image:
            assert torch.equal(got["pixel_values"], normalize([decode_image(image_path, 12, key="")], 12))
    assert (RESPONSE in expected.modality_ids) == (turns > 1)


def test_a_training_text_has_the_modalities_of_a_sample(processor: AkiProcessor, image_path: Path) -> None:
    template = Template(Tokenizer(TOKENIZER, FAMILIES["phi3"].chat), {Modality.IMAGE: LATENTS}, 512, SYSTEM_MESSAGE)
    dialogue = conversation(image_path, 2)
    sample = template.render_conversation(dialogue)
    assert sample is not None
    text = "".join(part.text for part in template.conversation_parts(dialogue))
    got = processor(text=text, images=Image.open(image_path))
    assert (got["input_ids"][0], got["modality_ids"][0]) == (sample.token_ids, sample.modality_ids)
    assert [PAD, TEXT, RESPONSE, IMAGE] == [Modality.PAD, Modality.TEXT, Modality.RESPONSE, Modality.IMAGE]


def test_sequences_are_padded_on_the_requested_side(processor: AkiProcessor, image_path: Path) -> None:
    texts, opened = ["<s><image>one", "<s>two <image> three<image>"], Image.open(image_path)
    for side, order in (("left", 1), ("right", -1)):
        got = processor(text=texts, images=[[opened], [opened, opened]], padding_side=side, return_tensors="pt")
        lengths = got["attention_mask"].sum(-1).tolist()
        padding = got["attention_mask"].shape[1] - lengths[0]
        assert padding > 0
        assert got["attention_mask"][0].tolist()[::order] == [0] * padding + [1] * lengths[0]
        assert got["input_ids"][0].tolist()[::order][:padding] == [511] * padding
        assert torch.equal(got["modality_ids"] == PAD, got["attention_mask"] == 0)
        assert got["pixel_values"].shape == (3, 3, 12, 12)
    with pytest.raises(ValueError, match="hold <image> 3 times, but 1 images were given"):
        processor(text=texts, images=[opened])
    with pytest.raises(ValueError, match="AkiProcessor has no max_length, truncation"):
        processor(text=texts[0], images=opened, truncation=True, max_length=4)


def test_each_family_writes_its_own_special_tokens() -> None:
    """Conversations rendered by the chat template that an exported folder holds."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    roles = {"a": "user", "b": "assistant", "c": "user"}
    chat_messages = [{"role": role, "content": text} for text, role in roles.items()]
    llama = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n", "user<|end_header_id|>\n\na")
    qwen = ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\na<|im_end|>\n")
    for family, (begin, user), answer in (
        ("llama", llama, "b<|eot_id|>"),
        ("qwen2", qwen, "b<|im_end|>\n<|im_start|>"),
    ):
        chat = FAMILIES[family].chat
        template = chat.chat_template(SYSTEM_MESSAGE)
        text = tokenizer.apply_chat_template(
            chat_messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert text.startswith(begin + SYSTEM_MESSAGE)
        assert user in text and chat.response_start + answer in text
        assert text.endswith(chat.response_start)
        with_system = [{"role": "system", "content": "S"}, *chat_messages]
        text = tokenizer.apply_chat_template(with_system, chat_template=template, tokenize=False)
        assert text.startswith(begin + "S") and SYSTEM_MESSAGE not in text
        quoted = "It's C:\\new {{ $x }}\nand a line."
        text = tokenizer.apply_chat_template(chat_messages, chat_template=chat.chat_template(quoted), tokenize=False)
        assert text.startswith(begin + quoted)


TRANSFORMERS_ONLY = """
import json, sys
sys.modules["aki_megatron"] = None  # importing it would fail
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoProcessor
folder, image_path, text, plain = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text=[text, plain], images=[image_path], return_tensors="pt")
generated = {}
for auto, backend in ((AutoModelForCausalLM, "eager"), (AutoModelForImageTextToText, "sdpa")):
    model = auto.from_pretrained(folder, trust_remote_code=True, attn_implementation=backend)
    for beams in (1, 3):
        tokens = model.generate(**inputs, max_new_tokens=8, num_beams=beams, eos_token_id=None)
        generated[f"{backend} {beams}"] = tokens[:, inputs["input_ids"].shape[1]:].tolist()
generated["stops"] = model.generation_config.eos_token_id
alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert alone.to_dict() == processor.image_processor.to_dict()
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
generated["base"] = type(base).__name__, list(base(**inputs).last_hidden_state.shape)
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
again = AutoProcessor.from_pretrained(folder + "/again", trust_remote_code=True)
alone = AutoImageProcessor.from_pretrained(folder + "/again", trust_remote_code=True)
assert alone.to_dict() == again.image_processor.to_dict() == processor.image_processor.to_dict()
given = again(text=[text, plain], images=[image_path], return_tensors="pt")
assert (given["pixel_values"] == inputs["pixel_values"]).all()
print(json.dumps(generated))
"""


def test_transformers_alone_generates_what_we_generate(exported: Path, image_path: Path, tmp_path: Path) -> None:
    """In a process that cannot import this package, which then loads what it saved."""
    template = Template(Tokenizer(TOKENIZER, FAMILIES["phi3"].chat), {Modality.IMAGE: LATENTS}, 512, SYSTEM_MESSAGE)
    dialogues = [conversation(image_path), conversation(None)]
    texts = ["".join(part.text for part in template.conversation_parts(each)[:-1]) for each in dialogues]
    home = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS_ONLY, str(exported), str(image_path), *texts],
        capture_output=True,
        text=True,
        timeout=280,
        env=home,
        cwd=tmp_path,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    generated = json.loads(process.stdout.splitlines()[-1])
    stage = random_stage(config("phi3", **SIZES))
    prompts = collate([[template.render_prompt(each)] for each in dialogues], pad_id=511, image_size=12)
    expected = generate(stage, prompts, stop_ids=(), max_new_tokens=8)
    assert generated["eager 1"] == generated["sdpa 1"] == expected
    assert generated["eager 3"] == generated["sdpa 3"] != expected
    assert generated["base"] == ["AkiModel", [2, prompts.token_ids.shape[1], 32]]
    assert set(generated["stops"]) == template.tokenizer.stop_ids
