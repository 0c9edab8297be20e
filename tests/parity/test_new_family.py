"""A decoder family added from outside, by one file and one registration, works everywhere; see docs/extending.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_ranks import text_ids
from exported_aki import LATENTS, batch, inputs, load, prompts, random_stage, source_of, write
from PIL import Image
from safetensors.torch import load_file
from toy_family import FAMILY, NAME, registered, tokenizer_folder
from toy_reference import ToyConfig, ToyForCausalLM
from transformers import SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint.conversion_steps import ConversionSettings
from aki_megatron.checkpoint.conversions import from_export, from_hf, to_hf
from aki_megatron.checkpoint.hf_config import decoder_config, language_config_json
from aki_megatron.checkpoint.hf_export import exported_source, write_processor
from aki_megatron.checkpoint.hf_folders import language_source
from aki_megatron.checkpoint.initial_weights import load_pretrained
from aki_megatron.checkpoint.processing_aki import AkiProcessor
from aki_megatron.checkpoint.tensors import to_external, to_native
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.config.load import load_run
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError
from aki_megatron.model.stage import build_model
from aki_megatron.types import Conversation, Modality, Turn, image_items, stack_ids

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
TINY_VISION = {"image_size": 12, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
TINY_ENCODER = VisionConfig(num_layers=2, num_heads=2, **TINY_VISION)
RESAMPLER = ResamplerConfig(num_latents=LATENTS, num_layers=1, num_heads=2, head_dim=8)
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def family() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "published")


def language_model(folder: Path, **changed: Any) -> ToyForCausalLM:
    """A random model, saved as transformers saves it; norms and biases differ from one and zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"ffn_dim": 96, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 256, "rms_norm_eps": 1e-6}
    model = ToyForCausalLM(ToyConfig(**sizes | changed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def test_the_configuration_accepts_it_and_errors_list_it(capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"default_config": SFT, "prog": "sft.py", "description": ""}
    run = load_run(["--model.decoder.family", NAME], **settings)
    assert run.model.decoder.traits == FAMILY.traits
    with pytest.raises(ConfigError, match='model.decoder.family must be one of phi3, .*, toy; got "toys"'):
        load_run(["--model.decoder.family", "toys"], **settings)
    with pytest.raises(SystemExit):
        load_run(["--help"], **settings)
    assert "phi3|llama|qwen2|qwen3|toy" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("tied", [False, True])
def test_weights_load_by_name_and_logits_equal_transformers(tied: bool, tmp_path: Path) -> None:
    external = language_model(tmp_path, tie_word_embeddings=tied)
    assert ("output.weight" in load_file(tmp_path / WEIGHTS)) != tied
    decoder = decoder_config(tmp_path, vocab_size=500, num_added_tokens=2)
    assert decoder == DecoderConfig(
        family=NAME, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=96, norm_eps=1e-6,
        padded_vocab_size=512, vocab_size=500, tie_word_embeddings=tied, rope=RopeConfig(max_position_embeddings=256),
    )  # fmt: skip
    config = ModelConfig(vision=TINY_ENCODER, resampler=RESAMPLER, decoder=decoder)
    native = build_model(config, attention=AttentionConfig(rule="causal"))
    random = load_pretrained(native, language=tmp_path)
    assert not [name for name in random if name.startswith("layers.")]
    tokens = torch.randint(0, 500, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = external(tokens).logits[..., :500], native.logits(tokens, text_ids(tokens))[..., :500]
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
        native.layers["1"].attention.qkv_proj.bias.zero_()
        assert (native.logits(tokens, text_ids(tokens))[..., :500] - expected).abs().max() > 1e-2


def test_its_hugging_face_folder_survives_a_round_trip(tmp_path: Path) -> None:
    language_model(tmp_path)
    decoder = decoder_config(tmp_path, vocab_size=500, num_added_tokens=2)
    source = language_source(tmp_path, decoder)
    back = to_external(to_native(source.tensors, source.table), source.table, decoder)
    stored = load_file(tmp_path / WEIGHTS)
    assert back.specs.keys() == stored.keys() and "transformer.h.1.attn.q.bias" in stored
    assert all(torch.equal(back.get(name), tensor) for name, tensor in stored.items())
    config_json = language_config_json(decoder)
    assert (config_json["model_type"], config_json["ffn_dim"], config_json["attention_bias"]) == (NAME, 96, False)
    (tmp_path / "again").mkdir()
    (tmp_path / "again/config.json").write_text(json.dumps(config_json))
    assert decoder_config(tmp_path / "again", vocab_size=500, num_added_tokens=2) == decoder


def test_an_exported_folder_computes_the_same_and_is_read_back(tmp_path: Path) -> None:
    values = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 48}
    values |= {"vocab_size": 40, "num_added_tokens": 2, "padded_vocab_size": 45, "norm_eps": 1e-6}
    decoder = DecoderConfig(family=NAME, rope=RopeConfig(), **values)
    stage = random_stage(ModelConfig(vision=TINY_ENCODER, resampler=RESAMPLER, decoder=decoder))
    folder = write(stage, tmp_path / "exported")
    found, native = exported_source(folder), source_of(stage)
    assert found.config == stage.config and found.source.specs == native.specs
    assert all(torch.equal(found.source.get(name), native.get(name)) for name in native.specs)
    texts, pixels = prompts()
    given, exported_inputs = batch(texts, torch.cat(pixels)), inputs(texts, torch.cat(pixels), "right")
    with torch.no_grad():
        expected = stage.logits(given.token_ids, stack_ids(given), given.media)[given.modality_ids != Modality.PAD]
        got = load(folder)(**exported_inputs).logits[exported_inputs["attention_mask"] == 1]
    assert (got - expected[:, :42]).abs().max() <= 1e-4 * expected[:, :42].abs().max()


def test_conversions_pass_their_logits_check(tokenizer: Path, tmp_path: Path) -> None:
    """From its folder to a checkpoint, to an exported folder, and back; each conversion compares the logits."""
    language_model(tmp_path / "language", vocab_size=640)
    torch.manual_seed(1)
    SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=2, num_attention_heads=2, **TINY_VISION)).save_pretrained(
        tmp_path / "vision"
    )
    settings = ConversionSettings()
    reports = [
        from_hf(
            tmp_path / "language", tmp_path / "vision", tmp_path / "run", settings, model=None, tokenizer=tokenizer
        ),
        to_hf(tmp_path / "run", tmp_path / "exported", settings, tokenizer=None),
        from_export(tmp_path / "exported", tmp_path / "again", settings),
    ]
    assert all("passed" in report.notes["check"] for report in reports)
    stock, exported = load_file(tmp_path / "language" / WEIGHTS), load_file(tmp_path / "exported" / WEIGHTS)
    for name, tensor in stock.items():
        exported_name = name.replace("transformer.", "model.language_model.").replace("output.", "lm_head.")
        assert torch.equal(exported[exported_name], tensor), name


def test_its_chat_format_is_that_of_training_and_of_the_export(tokenizer: Path, tmp_path: Path) -> None:
    training = Tokenizer(tokenizer, FAMILY.chat)
    template = Template(training, {Modality.IMAGE: LATENTS}, 512, SYSTEM_MESSAGE)
    dialogue = Conversation("key", (Turn("What is it?", " A box."), Turn("And this?", "12")), image_items(b"x"))
    text = "".join(part.text for part in template.conversation_parts(dialogue))
    assert text == (
        f"<|begin|>\n<|role|>system: {SYSTEM_MESSAGE}<|stop|>\n\n<|role|>user: <image>\nWhat is it?<|stop|>\n\n"
        "<|role|>assistant:  A box.<|stop|>\n\n<|role|>user: And this?<|stop|>\n\n<|role|>assistant: 12<|end|>"
    )
    sizes = {"padded_vocab_size": 640, "vocab_size": training.image_id, "rope": RopeConfig(), "family": NAME}
    sizes |= {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
    config = ModelConfig(vision=TINY_ENCODER, resampler=RESAMPLER, decoder=DecoderConfig(**sizes))
    write_processor(tokenizer, config, tmp_path)
    processor = AkiProcessor.from_pretrained(tmp_path)
    sample = template.render_conversation(dialogue)
    assert sample is not None
    got = processor(text=text, images=Image.new("RGB", (9, 7)))
    assert (got["input_ids"][0], got["modality_ids"][0]) == (sample.token_ids, sample.modality_ids)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": " A box."},
        {"role": "user", "content": "And this?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == text.removesuffix("12<|end|>")
