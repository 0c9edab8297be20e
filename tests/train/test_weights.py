"""The weights a run starts from reach every rank of a spread model, each rank's part of them only."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint import weight_names as weight_files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import WEIGHT
from aki_megatron.checkpoint.hf_folders import load_pretrained
from aki_megatron.checkpoint.initial_weights import copy_weights, load_weights, open_weights, whole_parameters
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.split import cut, split_of
from aki_megatron.model.stage import Stage, build_model, build_stage, global_names
from aki_megatron.parallel.megatron import build_linears

MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12),
    resampler=ResamplerConfig(num_latents=2, num_layers=1, num_heads=2, head_dim=4, mlp_ratio=2),
    decoder=DecoderConfig(
        hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=12, padded_vocab_size=38, vocab_size=35, num_added_tokens=3,
        lm_head_bias=True, rope=RopeConfig(),
    ),
)  # fmt: skip
SPREAD = {"tensor": 2, "pipeline": 2}


def with_decoder(**changed) -> ModelConfig:
    return MODEL.model_copy(update={"decoder": MODEL.decoder.model_copy(update=changed)})


def part(topology, config: ModelConfig) -> Stage:
    """This rank's stage with weights of its own, to be overwritten."""
    layers = (range(1), range(1, config.decoder.num_layers))[topology.pipeline_rank]
    return build_stage(config, layers, rule="mma", seed=99, linears=build_linears(topology))


def wrong_parts(stage: Stage, whole: dict[str, Tensor], topology) -> list[str]:
    """Names of a stage's parameters that are not this tensor rank's part of the whole model's."""
    names = global_names(stage)
    assert names
    wrong = []
    for name, parameter in stage.named_parameters():
        share = cut(whole[names[name]], split_of(name, stage.config.decoder), topology.tensor_rank, topology.tensor)
        wrong += [] if torch.equal(parameter, share) else [name]
    return wrong


def save_model(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint of a new whole model; its weights."""
    whole = {name: tensor.detach() for name, tensor in build_model(config, rule="mma", seed=5).named_parameters()}
    Checkpointer(folder, keep_last=1).save(1, {WEIGHT + name: tensor for name, tensor in whole.items()}, {"step": 1})
    return whole


def fill_from_checkpoint(topology, config: ModelConfig, folder: Path, whole: dict[str, Tensor]) -> list[str]:
    stage = part(topology, config)
    copy_weights(stage, open_weights(folder, config), tensor_rank=topology.tensor_rank, tensor_ranks=topology.tensor)
    return wrong_parts(stage, whole, topology)


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_reaches_every_rank(run_on, tmp_path, tied):
    config = with_decoder(tie_word_embeddings=tied)
    whole = save_model(tmp_path, config)
    assert run_on(4, fill_from_checkpoint, config, tmp_path, whole, **SPREAD) == [[], [], [], []]


def test_a_checkpoint_fills_a_whole_model(tmp_path):
    whole = save_model(tmp_path, MODEL)
    model = build_model(MODEL, rule="mma", seed=99)
    load_weights(model, tmp_path)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.named_parameters())


def refusal(topology, config: ModelConfig, folder: Path) -> str:
    try:
        open_weights(folder, config)
    except CheckpointError as error:
        return str(error)
    return "opened"


@pytest.mark.distributed
def test_the_whole_model_is_compared_on_every_rank(run_on, tmp_path):
    """Also what only the last stage holds."""
    save_model(tmp_path, MODEL)
    for message in run_on(2, refusal, with_decoder(lm_head_bias=False), tmp_path, pipeline=2):
        assert "2 tensors differ" in message
        assert "head.output.bias: (38,) in the checkpoint, missing in the model" in message


def fill_from_folders(topology, config: ModelConfig, vision: Path, language: Path, whole: dict[str, Tensor]):
    """Names that stay random, and names that are neither that nor right."""
    stage = part(topology, config)
    share = {"tensor_rank": topology.tensor_rank, "tensor_ranks": topology.tensor}
    fresh = load_pretrained(stage, vision=vision, language=language, **share)
    return fresh, sorted(set(wrong_parts(stage, whole, topology)) - set(fresh))


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_public_weights_reach_every_rank(run_on, tmp_path, tied):
    config = with_decoder(tie_word_embeddings=tied)
    vision, decoder = config.vision, config.decoder
    encoder = SiglipVisionConfig(
        image_size=vision.image_size, patch_size=vision.patch_size, hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers, num_attention_heads=vision.num_heads, intermediate_size=vision.intermediate_size,
    )  # fmt: skip
    language = Phi3Config(
        hidden_size=decoder.hidden_size, num_hidden_layers=decoder.num_layers, num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads, intermediate_size=decoder.intermediate_size, vocab_size=decoder.padded_vocab_size,
        pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    SiglipVisionModel(encoder).save_pretrained(tmp_path / "vision")
    Phi3ForCausalLM(language).save_pretrained(tmp_path / "language")
    model = build_model(config, rule="mma", seed=99)
    stays = load_pretrained(model, vision=tmp_path / "vision", language=tmp_path / "language")
    whole = {name: tensor.detach() for name, tensor in model.named_parameters()}
    answers = run_on(4, fill_from_folders, config, tmp_path / "vision", tmp_path / "language", whole, **SPREAD)
    assert all(wrong == [] for _, wrong in answers)
    assert sorted({name for fresh, _ in answers for name in fresh}) == stays
    own_head = set() if tied else {"head.extra.weight"}
    assert own_head | {"head.extra.bias", "head.output.bias", "front.embedding.extra"} <= set(stays)


def test_parameters_of_the_whole_model_take_no_memory():
    parameters = whole_parameters(ModelConfig())
    assert sum(parameter.numel() for parameter in parameters.values()) > 4e9
    assert all(parameter.is_meta for parameter in parameters.values())
    shapes = {name: shape for name, shape in weight_files.model_shapes(MODEL).items()}
    assert {name: tuple(tensor.shape) for name, tensor in whole_parameters(MODEL).items()} == shapes
