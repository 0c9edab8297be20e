"""The weights a run starts from reach every rank of a parallel model, each rank's shard of them only."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config, Phi3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.dcp_io import WEIGHT
from aki_megatron.checkpoint.initial_weights import (
    copy_weights,
    load_pretrained,
    load_weights,
    open_weights,
)
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.sharding import shard_spec, shard_tensor
from aki_megatron.model.stage import Stage, build_model, build_stage, global_names
from aki_megatron.parallel.megatron import build_linears

MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12),
    resampler=ResamplerConfig(num_latents=2, num_layers=1, num_heads=2, head_dim=4, mlp_ratio=2),
    decoder=DecoderConfig(
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=12,
        padded_vocab_size=38,
        vocab_size=35,
        num_added_tokens=3,
        lm_head_bias=True,
        rope=RopeConfig(),
    ),
)
LAYOUT = {"tensor": 2, "pipeline": 2}


def with_decoder(**changed) -> ModelConfig:
    return MODEL.model_copy(update={"decoder": MODEL.decoder.model_copy(update=changed)})


def build_local_stage(topology, config: ModelConfig) -> Stage:
    """This rank's stage with weights of its own, to be overwritten."""
    layers = (range(1), range(1, config.decoder.num_layers))[topology.pipeline_rank]
    return build_stage(config, layers, attention=AttentionConfig(rule="mma"), seed=99, linears=build_linears(topology))


def wrong_shards(stage: Stage, full: dict[str, Tensor], topology) -> list[str]:
    """Names of a stage's parameters that are not this tensor rank's shard of the whole model's."""
    names = global_names(stage)
    assert names
    wrong = []
    for name, parameter in stage.named_parameters():
        spec = shard_spec(name, stage.config.decoder)
        shard = shard_tensor(full[names[name]], spec, topology.tensor_rank, topology.tensor)
        wrong += [] if torch.equal(parameter, shard) else [name]
    return wrong


def save_model(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """A checkpoint of a new whole model; its weights."""
    model = build_model(config, attention=AttentionConfig(rule="mma"), seed=5)
    full = {name: tensor.detach() for name, tensor in model.named_parameters()}
    Checkpointer(folder, keep_last=1).save(1, {WEIGHT + name: tensor for name, tensor in full.items()}, {"step": 1})
    return full


def init_from_checkpoint(topology, config: ModelConfig, folder: Path, full: dict[str, Tensor]) -> list[str]:
    stage = build_local_stage(topology, config)
    copy_weights(stage, open_weights(folder, config), tensor_rank=topology.tensor_rank, tensor_ranks=topology.tensor)
    return wrong_shards(stage, full, topology)


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_reaches_every_rank(run_on, tmp_path, tied):
    config = with_decoder(tie_word_embeddings=tied)
    full = save_model(tmp_path, config)
    assert run_on(4, init_from_checkpoint, config, tmp_path, full, **LAYOUT) == [[], [], [], []]


def test_load_weights_fills_a_whole_model(tmp_path):
    full = save_model(tmp_path, MODEL)
    model = build_model(MODEL, attention=AttentionConfig(rule="mma"), seed=99)
    load_weights(model, tmp_path)
    assert all(torch.equal(tensor, full[name]) for name, tensor in model.named_parameters())


def open_error(topology, config: ModelConfig, folder: Path) -> str:
    try:
        open_weights(folder, config)
    except CheckpointError as error:
        return str(error)
    return "opened"


@pytest.mark.distributed
def test_the_whole_model_is_compared_on_every_rank(run_on, tmp_path):
    """Also what only the last stage holds."""
    save_model(tmp_path, MODEL)
    for message in run_on(2, open_error, with_decoder(lm_head_bias=False), tmp_path, pipeline=2):
        assert "(2 differences)" in message
        assert "unexpected: lm_head.base.bias (38,)" in message


def damage_and_open(topology, folder: Path) -> str:
    """Only one rank reads the damaged file."""
    topology.barrier()
    if topology.rank == 0:
        path = folder / "step_000001" / "__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-1])
    topology.barrier()
    return open_error(topology, MODEL, folder)


@pytest.mark.distributed
def test_a_damaged_file_is_an_error_on_every_rank(run_on, tmp_path):
    save_model(tmp_path, MODEL)
    for message in run_on(2, damage_and_open, tmp_path):
        assert "__0_0.distcp has" in message


def test_a_checkpoint_that_its_run_removes_is_named(tmp_path):
    """The run that wrote it still trains, and keeps only its newest checkpoints."""
    save_model(tmp_path / "checkpoints", MODEL)
    source = open_weights(tmp_path, MODEL)
    shutil.rmtree(source.path)
    with pytest.raises(CheckpointError, match=r"step_000001 was removed while it was read.*checkpoint\.keep_every"):
        copy_weights(build_model(MODEL, attention=AttentionConfig(rule="mma"), seed=0), source)


def test_a_checkpoint_that_is_being_written_is_none_yet(tmp_path):
    (tmp_path / "checkpoints/.writing_step_000007").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="No complete checkpoint in .* step_000007 is being written"):
        open_weights(tmp_path, MODEL)


def open_elsewhere(topology, folder: Path) -> str:
    return open_error(topology, MODEL, folder / "nowhere" if topology.rank else folder)


@pytest.mark.distributed
def test_all_ranks_fail_to_open_together(run_on, tmp_path):
    """One rank does not see the checkpoint (a folder that is not shared); the other does not wait for it."""
    save_model(tmp_path, MODEL)
    for message in run_on(2, open_elsewhere, tmp_path):
        assert "No complete checkpoint in" in message and "nowhere" in message


def init_from_folders(topology, config: ModelConfig, vision: Path, language: Path, full: dict[str, Tensor]):
    """Names that stay random, and names that are neither random nor right."""
    stage = build_local_stage(topology, config)
    shard = {"tensor_rank": topology.tensor_rank, "tensor_ranks": topology.tensor}
    random = load_pretrained(stage, vision=vision, language=language, **shard)
    return random, sorted(set(wrong_shards(stage, full, topology)) - set(random))


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True])
def test_public_weights_reach_every_rank(run_on, tmp_path, tied):
    config = with_decoder(tie_word_embeddings=tied)
    vision, decoder = config.vision, config.decoder
    encoder = SiglipVisionConfig(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_size=vision.hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_heads,
        intermediate_size=vision.intermediate_size,
    )
    language = Phi3Config(
        hidden_size=decoder.hidden_size,
        num_hidden_layers=decoder.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        intermediate_size=decoder.intermediate_size,
        vocab_size=decoder.padded_vocab_size,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    SiglipVisionModel(encoder).save_pretrained(tmp_path / "vision")
    Phi3ForCausalLM(language).save_pretrained(tmp_path / "language")
    model = build_model(config, attention=AttentionConfig(rule="mma"), seed=99)
    random = load_pretrained(model, vision=tmp_path / "vision", language=tmp_path / "language")
    full = {name: tensor.detach() for name, tensor in model.named_parameters()}
    results = run_on(4, init_from_folders, config, tmp_path / "vision", tmp_path / "language", full, **LAYOUT)
    assert all(wrong == [] for _, wrong in results)
    assert sorted({name for names, _ in results for name in names}) == random
    added = {"lm_head.added_tokens.bias", "lm_head.base.bias", "input_embedder.token_embedding.added_tokens"}
    added |= set() if tied else {"lm_head.added_tokens.weight"}
    assert added <= set(random)
