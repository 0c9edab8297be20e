"""Encoder and decoder equal transformers' SigLIP and Phi-3 with the same random weights, loaded from their folders."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_ranks import text_ids
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint.hf_folders import save_vision
from aki_megatron.checkpoint.initial_weights import load_pretrained
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE

VISION = VisionConfig(image_size=30, patch_size=7, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48)
RESAMPLER = ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=8)
SHORT, LONG = (1.0, 1.1, 1.3, 1.7, 2.0, 2.2, 2.5, 2.9), (1.1, 1.5, 3.0, 7.0, 12.0, 20.0, 30.0, 33.0)
LONGROPE = RopeConfig(
    rope_type="longrope",
    theta=1000.0,
    max_position_embeddings=64,
    original_max_position_embeddings=16,
    short_factor=SHORT,
    long_factor=LONG,
)
DECODER = DecoderConfig(
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    intermediate_size=80,
    padded_vocab_size=60,
    vocab_size=60,
    num_added_tokens=0,
    lm_head_bias=False,
    rope=RopeConfig(),
)


def model_config(**decoder: Any) -> ModelConfig:
    return ModelConfig(vision=VISION, resampler=RESAMPLER, decoder=DECODER.model_copy(update=decoder))


def siglip_values() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 30,
        "patch_size": 7,
    }


def phi3(rope: RopeConfig, **changed: Any) -> Phi3ForCausalLM:
    """A random Phi-3 of DECODER's size; its norms differ from one, so that the comparison covers them."""
    scaling = None
    if rope.rope_type == "longrope":
        scaling = {"type": "longrope", "short_factor": list(SHORT), "long_factor": list(LONG)}
    values = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 80,
        "vocab_size": 60,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": rope.theta,
        "max_position_embeddings": rope.max_position_embeddings,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "rope_scaling": scaling,
        "attn_implementation": "eager",
        "initializer_range": 0.1,
    } | changed
    torch.manual_seed(0)
    return perturbed(Phi3ForCausalLM(Phi3Config(**values))).eval()


def perturbed(model: torch.nn.Module) -> Any:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def loaded(config: ModelConfig, **folders: Path) -> Stage:
    torch.manual_seed(1)
    model = build_model(config, attention=AttentionConfig(rule="causal"))
    load_pretrained(model, **folders)
    return model.eval()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiglipVisionModel, Path]:
    torch.manual_seed(0)
    model = perturbed(SiglipVisionModel(SiglipVisionConfig(**siglip_values()))).eval()
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Phi3ForCausalLM, Path]:
    model, folder = phi3(RopeConfig()), tmp_path_factory.mktemp("phi")
    model.save_pretrained(folder)
    return model, folder


def test_vision_equals_siglip(siglip: tuple[SiglipVisionModel, Path]) -> None:
    external, folder = siglip
    native = loaded(model_config(), vision=folder)
    pixels = torch.randn(3, 3, 30, 30)
    with torch.no_grad():
        expected = external(pixels).last_hidden_state
        torch.testing.assert_close(native.input_embedder.vision_encoder(pixels), expected, rtol=1e-5, atol=1e-5)


def test_vision_of_a_full_siglip_folder(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    external = perturbed(SiglipModel(SiglipConfig(vision_config=siglip_values(), text_config=text | {"vocab_size": 9})))
    external.save_pretrained(tmp_path)
    native = loaded(model_config(), vision=tmp_path)
    pixels = torch.randn(1, 3, 30, 30)
    with torch.no_grad():
        expected = external.eval().vision_model(pixels).last_hidden_state
        torch.testing.assert_close(native.input_embedder.vision_encoder(pixels), expected, rtol=1e-5, atol=1e-5)


def test_a_written_encoder_is_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(model_config(), attention=AttentionConfig(rule="causal"))
    save_vision(model.input_embedder.vision_encoder, VISION, tmp_path)
    external = SiglipVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        expected = model.input_embedder.vision_encoder(pixels)
        torch.testing.assert_close(external(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded(model_config(), vision=tmp_path).input_embedder.vision_encoder(pixels), expected)


@pytest.mark.parametrize(
    ("rope", "num_kv_heads", "length"),
    [(RopeConfig(), 4, 20), (RopeConfig(), 2, 20), (RopeConfig(), 1, 20)]
    + [(LONGROPE, 4, 12), (LONGROPE, 2, 16), (LONGROPE, 2, 17), (LONGROPE, 4, 40)],
    ids=lambda value: value.rope_type if isinstance(value, RopeConfig) else str(value),
)
def test_decoder_equals_phi3(rope: RopeConfig, num_kv_heads: int, length: int, tmp_path: Path) -> None:
    external = phi3(rope, num_key_value_heads=num_kv_heads)
    external.save_pretrained(tmp_path)
    native = loaded(model_config(rope=rope, num_kv_heads=num_kv_heads), language=tmp_path)
    tokens = torch.randint(0, 60, (2, length))
    with torch.no_grad():
        expected = external(tokens).logits
        got = native.logits(tokens, text_ids(tokens))
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-5)


def test_gradients_equal_phi3(phi: tuple[Phi3ForCausalLM, Path]) -> None:
    external, folder = phi
    native = loaded(model_config(), language=folder)
    tokens = torch.randint(1, 60, (2, 20))  # transformers gives its padding token, 0, no gradient
    targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    native(tokens, text_ids(tokens, targets=targets)).backward()
    torch.nn.functional.cross_entropy(
        external(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    table = {
        "input_embedder.token_embedding.base.weight": external.model.embed_tokens.weight,
        "layers.0.attention.qkv_proj.weight": external.model.layers[0].self_attn.qkv_proj.weight,
        "layers.2.mlp.gate_up_proj.weight": external.model.layers[2].mlp.gate_up_proj.weight,
        "layers.1.attention_norm.weight": external.model.layers[1].input_layernorm.weight,
        "lm_head.base.weight": external.lm_head.weight,
    }
    for name, parameter in table.items():
        got, expected = native.get_parameter(name).grad, parameter.grad
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name


def test_longrope_factors_depend_on_the_sequence_not_on_the_batch(tmp_path: Path) -> None:
    """A short sequence beside a long one has the logits that it has alone; transformers decides for the whole batch."""
    external = phi3(LONGROPE)
    external.save_pretrained(tmp_path)
    native = loaded(model_config(rope=LONGROPE), language=tmp_path)
    tokens = torch.randint(0, 60, (2, 30))
    with torch.no_grad():
        got = native.logits(tokens, text_ids(tokens, lengths=(30, 10)))
        for sequence, length in ((0, 30), (1, 10)):
            expected = external(tokens[sequence : sequence + 1, :length]).logits[0]
            scale = expected.abs().max()
            torch.testing.assert_close(got[sequence, :length] / scale, expected / scale, rtol=0, atol=1e-5)


def test_a_sharded_folder_and_the_tensors_that_stay_random(tmp_path: Path) -> None:
    external = phi3(RopeConfig())
    external.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config = model_config(vocab_size=50, num_added_tokens=2, lm_head_bias=True)
    model = build_model(config, attention=AttentionConfig(rule="causal"))
    random = load_pretrained(model, language=tmp_path)
    encoder = ("input_embedder.vision_encoder", "input_embedder.resampler")
    assert [name for name in random if not name.startswith(encoder)] == [
        "input_embedder.token_embedding.added_tokens",
        "lm_head.added_tokens.bias",
        "lm_head.added_tokens.weight",
        "lm_head.base.bias",
    ]
    assert not model.lm_head.base.bias.any()
    assert torch.equal(model.layers["2"].attention.qkv_proj.weight, external.model.layers[2].self_attn.qkv_proj.weight)
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="incomplete.*model-00002"):
        load_pretrained(model, language=tmp_path)


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    external = phi3(RopeConfig(), tie_word_embeddings=True)
    external.save_pretrained(tmp_path)
    model = loaded(model_config(tie_word_embeddings=True), language=tmp_path)
    assert model.lm_head.base.weight is model.input_embedder.token_embedding.base.weight
    tokens = torch.randint(0, 60, (1, 9))
    with torch.no_grad():
        expected = external(tokens).logits
        got = model.logits(tokens, text_ids(tokens))
    torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_size": 32}, "hidden_size=64"),
        ({"num_layers": 2}, "num_hidden_layers=3"),
        ({"num_kv_heads": 2}, "num_key_value_heads=4"),
        ({"padded_vocab_size": 64}, "vocab_size=60"),
        ({"norm_eps": 1e-6}, "rms_norm_eps=1e-05"),
        ({"rope": LONGROPE}, "rope.rope_type=longrope, the folder has rope_type=default"),
        ({"rope": RopeConfig(theta=500.0)}, "rope.theta=500.0, the folder has rope_theta=10000.0"),
    ],
)
def test_a_folder_of_another_language_model_is_refused(
    changed: dict[str, Any], message: str, phi: tuple[Phi3ForCausalLM, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(model_config(**changed), language=phi[1])


def test_other_longrope_factors_are_in_the_error(tmp_path: Path) -> None:
    phi3(LONGROPE).save_pretrained(tmp_path)
    other = LONGROPE.model_copy(update={"long_factor": (*LONG[:-1], 34.0)})
    with pytest.raises(ConfigError, match=r"rope.long_factor=.*34.0\], the folder has long_factor=.*33.0\]"):
        loaded(model_config(rope=other), language=tmp_path)


def test_the_config_json_of_transformers_4_is_read(tmp_path: Path) -> None:
    external = phi3(LONGROPE)
    external.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config_json = json.loads(path.read_text())
    rope = config_json.pop("rope_parameters")
    config_json |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: rope[key] for key in ("short_factor", "long_factor")} | {"type": "su"},
    }
    path.write_text(json.dumps(config_json))
    model = build_model(model_config(rope=LONGROPE), attention=AttentionConfig(rule="causal"))
    random = load_pretrained(model, language=tmp_path)
    assert not any(name.startswith(("layers", "lm_head")) for name in random)


def damaged(folder: Path, tmp_path: Path, change: dict[str, Tensor | None]) -> Path:
    """A copy of a model folder with tensors added, replaced or (None) removed."""
    tensors: dict[str, Tensor | None] = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_missing_unexpected_and_reshaped_tensors_are_all_in_the_error(
    phi: tuple[Phi3ForCausalLM, Path], tmp_path: Path
) -> None:
    change = {"model.norm.weight": None, "stray": torch.zeros(2), "lm_head.weight": torch.zeros(60, 65)}
    with pytest.raises(CheckpointError) as caught:
        loaded(model_config(), language=damaged(phi[1], tmp_path, change))
    for line in ("3 differences", "missing: model.norm.weight", "unexpected: stray", "lm_head.weight is (60, 65)"):
        assert line in str(caught.value)


def test_a_folder_without_pooling_head(siglip: tuple[SiglipVisionModel, Path], tmp_path: Path) -> None:
    without = {name: None for name in load_file(siglip[1] / "model.safetensors") if name.startswith("head.")}
    folder = damaged(siglip[1], tmp_path, without)
    with pytest.raises(CheckpointError, match="missing: head.probe"):
        loaded(model_config(), vision=folder)
    config = model_config().model_copy(update={"vision": VISION.model_copy(update={"pooling_head": False})})
    loaded(config, vision=folder)
    loaded(config, vision=siglip[1])  # a pooling head that the folder has may be left out


def test_folders_without_config_json_or_weights_are_refused(
    siglip: tuple[SiglipVisionModel, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no config.json"):
        loaded(model_config(), vision=tmp_path)
    (tmp_path / "config.json").write_text((siglip[1] / "config.json").read_text())
    with pytest.raises(CheckpointError, match="holds no weights"):
        loaded(model_config(), vision=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        loaded(model_config(), vision=tmp_path)


def test_bf16_is_as_exact_as_phi3_in_bf16(phi: tuple[Phi3ForCausalLM, Path]) -> None:
    """Both measured against fp32: our rounding error may be at most 1.5 times transformers'."""
    external, folder = phi
    native = loaded(model_config(), language=folder)
    tokens = torch.randint(0, 60, (4, 50))
    with torch.no_grad():
        exact = external(tokens).logits
        rounded = copy.deepcopy(external).bfloat16()(tokens).logits.float()
        got = native.bfloat16().logits(tokens, text_ids(tokens)).float()
    assert (got - exact).norm() <= 1.5 * (rounded - exact).norm()
