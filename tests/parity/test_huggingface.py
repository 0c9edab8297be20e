"""Encoder and decoder equal transformers' SigLIP and Phi-3 with the same random weights, loaded from their folders."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint.hf_folders import load_pretrained, save_vision
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, Modality

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
    """A random Phi-3 of DECODER's size; its norms are moved off one so that a forgotten one is noticed."""
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
    return roughened(Phi3ForCausalLM(Phi3Config(**values))).eval()


def roughened(model: torch.nn.Module) -> Any:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def text_ids(tokens: Tensor) -> Tensor:
    """Ids of whole rows of plain text: [B, T, 4]."""
    ids = torch.zeros(*tokens.shape, 4, dtype=torch.int32)
    ids[..., 0], ids[..., 2], ids[..., 3] = Modality.TEXT, torch.arange(tokens.shape[1]), IGNORE
    return ids


def loaded(config: ModelConfig, **folders: Path) -> Stage:
    torch.manual_seed(1)
    model = build_model(config, rule="causal")
    load_pretrained(model, **folders)
    return model.eval()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> tuple[SiglipVisionModel, Path]:
    torch.manual_seed(0)
    model = roughened(SiglipVisionModel(SiglipVisionConfig(**siglip_values()))).eval()
    folder = tmp_path_factory.mktemp("siglip")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Phi3ForCausalLM, Path]:
    model, folder = phi3(RopeConfig()), tmp_path_factory.mktemp("phi")
    model.save_pretrained(folder)
    return model, folder


def test_vision_equals_siglip(siglip: tuple[SiglipVisionModel, Path]) -> None:
    theirs, folder = siglip
    ours = loaded(model_config(), vision=folder)
    pixels = torch.randn(3, 3, 30, 30)
    with torch.no_grad():
        torch.testing.assert_close(ours.front.vision(pixels), theirs(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


def test_vision_of_a_full_siglip_folder(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    theirs = roughened(SiglipModel(SiglipConfig(vision_config=siglip_values(), text_config=text | {"vocab_size": 9})))
    theirs.save_pretrained(tmp_path)
    ours = loaded(model_config(), vision=tmp_path)
    pixels = torch.randn(1, 3, 30, 30)
    with torch.no_grad():
        expected = theirs.eval().vision_model(pixels).last_hidden_state
        torch.testing.assert_close(ours.front.vision(pixels), expected, rtol=1e-5, atol=1e-5)


def test_a_written_encoder_is_read_by_transformers_and_by_us(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(model_config(), rule="causal")
    save_vision(model.front.vision, VISION, tmp_path)
    theirs = SiglipVisionModel.from_pretrained(tmp_path).eval()
    pixels = torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        expected = model.front.vision(pixels)
        torch.testing.assert_close(theirs(pixels).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(loaded(model_config(), vision=tmp_path).front.vision(pixels), expected)


@pytest.mark.parametrize(
    ("rope", "num_kv_heads", "length"),
    [(RopeConfig(), 4, 20), (RopeConfig(), 2, 20), (RopeConfig(), 1, 20)]
    + [(LONGROPE, 4, 12), (LONGROPE, 2, 16), (LONGROPE, 2, 17), (LONGROPE, 4, 40)],
    ids=lambda value: value.rope_type if isinstance(value, RopeConfig) else str(value),
)
def test_decoder_equals_phi3(rope: RopeConfig, num_kv_heads: int, length: int, tmp_path: Path) -> None:
    theirs = phi3(rope, num_key_value_heads=num_kv_heads)
    theirs.save_pretrained(tmp_path)
    ours = loaded(model_config(rope=rope, num_kv_heads=num_kv_heads), language=tmp_path)
    tokens = torch.randint(0, 60, (2, length))
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = ours.logits(tokens, text_ids(tokens))
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-5)


def test_gradients_equal_phi3(phi: tuple[Phi3ForCausalLM, Path]) -> None:
    theirs, folder = phi
    ours = loaded(model_config(), language=folder)
    tokens = torch.randint(1, 60, (2, 20))  # transformers gives its padding token, 0, no gradient
    ids = text_ids(tokens)
    ids[:, :-1, 3] = tokens[:, 1:]
    ours(tokens, ids).backward()
    torch.nn.functional.cross_entropy(
        theirs(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    ).backward()
    table = {
        "front.embedding.table.weight": theirs.model.embed_tokens.weight,
        "blocks.0.attention.qkv.weight": theirs.model.layers[0].self_attn.qkv_proj.weight,
        "blocks.2.feed_forward.gate_up.weight": theirs.model.layers[2].mlp.gate_up_proj.weight,
        "blocks.1.attention_norm.weight": theirs.model.layers[1].input_layernorm.weight,
        "head.output.weight": theirs.lm_head.weight,
    }
    for name, parameter in table.items():
        got, expected = ours.get_parameter(name).grad, parameter.grad
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name


def test_long_factors_go_by_the_sequence_not_by_the_batch(tmp_path: Path) -> None:
    """A short row beside a long one gives what it gives alone; transformers decides for the whole batch."""
    theirs = phi3(LONGROPE)
    theirs.save_pretrained(tmp_path)
    ours = loaded(model_config(rope=LONGROPE), language=tmp_path)
    tokens = torch.randint(0, 60, (2, 30))
    ids = text_ids(tokens)
    ids[1, 10:, 0], ids[1, 10:, 1] = Modality.PAD, -1
    with torch.no_grad():
        got = ours.logits(tokens, ids)
        for row, length in ((0, 30), (1, 10)):
            expected = theirs(tokens[row : row + 1, :length]).logits[0]
            scale = expected.abs().max()
            torch.testing.assert_close(got[row, :length] / scale, expected / scale, rtol=0, atol=1e-5)


def test_sharded_folder_and_what_stays_new(tmp_path: Path) -> None:
    theirs = phi3(RopeConfig())
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    config = model_config(vocab_size=50, num_added_tokens=2, lm_head_bias=True)
    model = build_model(config, rule="causal")
    fresh = load_pretrained(model, language=tmp_path)
    assert [name for name in fresh if not name.startswith(("front.vision", "front.resampler"))] == [
        "front.embedding.extra",
        "head.extra.bias",
        "head.extra.weight",
        "head.output.bias",
    ]
    assert not model.head.output.bias.any()
    assert torch.equal(model.blocks["2"].attention.qkv.weight, theirs.model.layers[2].self_attn.qkv_proj.weight)
    next(tmp_path.glob("model-00002-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="incomplete.*model-00002"):
        load_pretrained(model, language=tmp_path)


def test_tied_tables_come_from_the_embedding(tmp_path: Path) -> None:
    theirs = phi3(RopeConfig(), tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    model = loaded(model_config(tie_word_embeddings=True), language=tmp_path)
    assert model.head.output.weight is model.front.embedding.table.weight
    tokens = torch.randint(0, 60, (1, 9))
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = model.logits(tokens, text_ids(tokens))
    torch.testing.assert_close(got / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden_size": 32}, "hidden_size=64"),
        ({"num_layers": 2}, "num_hidden_layers=3"),
        ({"num_kv_heads": 2}, "num_key_value_heads=4"),
        ({"padded_vocab_size": 64}, "vocab_size=60"),
        ({"norm_eps": 1e-6}, "rms_norm_eps=1e-05"),
        ({"rope": LONGROPE}, "rope.kind=longrope, the folder says rope_type=default"),
        ({"rope": RopeConfig(theta=500.0)}, "rope.theta=500.0, the folder says rope_theta=10000.0"),
    ],
)
def test_a_folder_of_another_language_model(
    changed: dict[str, Any], named: str, phi: tuple[Phi3ForCausalLM, Path]
) -> None:
    with pytest.raises(ConfigError, match=named):
        load_pretrained(build_model(model_config(**changed), rule="causal"), language=phi[1])


def test_other_longrope_factors_are_named(tmp_path: Path) -> None:
    phi3(LONGROPE).save_pretrained(tmp_path)
    other = LONGROPE.model_copy(update={"long_factor": (*LONG[:-1], 34.0)})
    with pytest.raises(ConfigError, match=r"rope.long_factor=.*34.0\], the folder says long_factor=.*33.0\]"):
        load_pretrained(build_model(model_config(rope=other), rule="causal"), language=tmp_path)


def test_the_config_json_of_transformers_4_is_understood(tmp_path: Path) -> None:
    theirs = phi3(LONGROPE)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    described = json.loads(path.read_text())
    rope = described.pop("rope_parameters")
    described |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {key: rope[key] for key in ("short_factor", "long_factor")} | {"type": "su"},
    }
    path.write_text(json.dumps(described))
    fresh = load_pretrained(build_model(model_config(rope=LONGROPE), rule="causal"), language=tmp_path)
    assert not any(name.startswith(("blocks", "head")) for name in fresh)


def damaged(folder: Path, tmp_path: Path, change: dict[str, Tensor | None]) -> Path:
    """A copy of a model folder with tensors put in, replaced or (None) taken out."""
    tensors: dict[str, Tensor | None] = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def test_missing_unknown_and_reshaped_tensors_are_all_named(phi: tuple[Phi3ForCausalLM, Path], tmp_path: Path) -> None:
    change = {"model.norm.weight": None, "stray": torch.zeros(2), "lm_head.weight": torch.zeros(60, 65)}
    with pytest.raises(CheckpointError) as caught:
        loaded(model_config(), language=damaged(phi[1], tmp_path, change))
    for line in ("3 differences", "missing: model.norm.weight", "not known: stray", "lm_head.weight is (60, 65)"):
        assert line in str(caught.value)


def test_a_folder_without_pooling_head(siglip: tuple[SiglipVisionModel, Path], tmp_path: Path) -> None:
    without = {name: None for name in load_file(siglip[1] / "model.safetensors") if name.startswith("head.")}
    folder = damaged(siglip[1], tmp_path, without)
    with pytest.raises(CheckpointError, match="missing: head.probe"):
        loaded(model_config(), vision=folder)
    config = model_config().model_copy(update={"vision": VISION.model_copy(update={"pooling_head": False})})
    loaded(config, vision=folder)
    loaded(config, vision=siglip[1])  # a head that is there is not wanted, and no mistake


def test_no_folder_no_config_no_weights(siglip: tuple[SiglipVisionModel, Path], tmp_path: Path) -> None:
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
    theirs, folder = phi
    ours = loaded(model_config(), language=folder)
    tokens = torch.randint(0, 60, (4, 50))
    with torch.no_grad():
        exact = theirs(tokens).logits
        rounded = copy.deepcopy(theirs).bfloat16()(tokens).logits.float()
        got = ours.bfloat16().logits(tokens, text_ids(tokens)).float()
    assert (got - exact).norm() <= 1.5 * (rounded - exact).norm()
