"""Every rule reaches the model: forward equals a reference, cached generation equals recomputation, export refuses."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from attention_samples import attend_by_mask, masks_by_loops
from rule_runs import RUNS, concentric_by_loops, config_of, prompts, training_batch
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.attention.reference_mask import reference_mask
from aki_megatron.checkpoint.configuration_aki import RULES as EXPORTED_RULES
from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec
from aki_megatron.config.attention import ATTENTION_RULES
from aki_megatron.config.model import RopeConfig
from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.generate import generate
from aki_megatron.model import decoder
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import Batch, Modality, stack_ids

LONGROPE = RopeConfig(
    rope_type="longrope",
    max_position_embeddings=256,
    original_max_position_embeddings=12,
    short_factor=(1.0, 1.2, 1.5, 2.0),
    long_factor=(2.0, 4.0, 9.0, 30.0),
)


def model_of(name: str, rope: RopeConfig | None = None) -> Stage:
    config = config_of(name)
    sizes = config.model
    if rope is not None:
        sizes = sizes.model_copy(update={"decoder": sizes.decoder.model_copy(update={"rope": rope})})
    model = build_model(sizes, attention=config.attention, seed=1).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def loss_and_gradient(model: Stage, batch: Batch) -> tuple[float, Tensor]:
    loss = model(batch.token_ids, stack_ids(batch), {Modality.IMAGE: batch.media[Modality.IMAGE].double()})
    (gradient,) = torch.autograd.grad(loss, [model.input_embedder.resampler.latents])
    return loss.item(), gradient


@pytest.mark.parametrize("name", RUNS)
def test_the_forward_pass_equals_a_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference attends by a dense mask of loops, and takes position ids counted token by token."""
    model, batch = model_of(name), training_batch(0)
    got = loss_and_gradient(model, batch)
    seen = reference_mask(batch.modality_ids, batch.segment_ids, model.attention, image_tokens=9)
    if name in ATTENTION_RULES:
        assert torch.equal(seen, masks_by_loops(batch.modality_ids, batch.segment_ids, name))
    monkeypatch.setattr(decoder, "attend", lambda q, k, v, mask: attend_by_mask(q, k, v, seen))
    monkeypatch.setattr(AttentionMask, "position_ids", lambda mask, sequential: sequential)
    if name == "cca":
        sequential = loss_and_gradient(model, batch)
        assert abs(sequential[0] - got[0]) > 1e-3
        batch = replace(batch, position_ids=concentric_by_loops(batch.modality_ids, batch.segment_ids))
    wanted = loss_and_gradient(model, batch)
    assert got[0] == pytest.approx(wanted[0], rel=1e-12)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-9, atol=1e-12)


def test_every_rule_gives_another_loss() -> None:
    losses = [loss_and_gradient(model_of(name), training_batch(0))[0] for name in RUNS]
    distances = [abs(a - b) for i, a in enumerate(losses) for b in losses[:i]]
    assert min(distances) > 1e-6


def recompute(model: Stage, batch: Batch, index: int, num_images_before: int, new_tokens: int) -> list[int]:
    """Continue one prompt with a full forward pass for every token, no cache, no padding."""
    length = int((batch.segment_ids[index] >= 0).sum())
    tokens, modality = batch.token_ids[index, :length], batch.modality_ids[index, :length]
    has_image = bool((modality == Modality.IMAGE).any())
    images = batch.media[Modality.IMAGE][num_images_before : num_images_before + has_image].double()
    for _ in range(new_tokens):
        so_far = Batch(
            tokens[None],
            modality[None],
            torch.zeros(1, len(tokens), dtype=torch.int32),
            torch.arange(len(tokens), dtype=torch.int32)[None],
            torch.full((1, len(tokens)), -100),
            {Modality.IMAGE: images},
        )
        with torch.no_grad():
            logits = model.logits(so_far.token_ids, stack_ids(so_far), so_far.media)
        tokens = torch.cat([tokens, logits[0, -1].argmax()[None]])
        modality = torch.cat([modality, torch.tensor([int(Modality.RESPONSE)], dtype=modality.dtype)])
    return tokens[length:].tolist()


@pytest.mark.parametrize("rope", [None, LONGROPE], ids=["rope", "longrope"])
@pytest.mark.parametrize("name", RUNS)
def test_cached_generation_equals_recomputation(name: str, rope: RopeConfig | None) -> None:
    """With longrope the prompts cross the length from which its long factors apply, each at another new token."""
    model, batch = model_of(name, rope), prompts(3)
    batch = replace(batch, media={Modality.IMAGE: batch.media[Modality.IMAGE].double()})
    images_before = (0, 1, 1)
    wanted = [recompute(model, batch, index, before, 12) for index, before in enumerate(images_before)]
    assert generate(model, batch, stop_ids=(), max_new_tokens=12) == wanted


@pytest.mark.parametrize("name", RUNS)
def test_export_writes_what_the_modelling_file_runs_and_refuses_the_rest(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    tensors = {key: tensor.detach().float() for key, tensor in model.named_parameters()}
    specs = {key: TensorSpec(tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    source = LazyTensors(specs, {key: partial(tensors.__getitem__, key) for key in tensors})
    rule, out = model.attention.rule, tmp_path / "out"
    if name in EXPORTED_RULES:
        export(source, model.config, model.attention, None, out)
        assert f'"attention_rule": "{rule}"' in (out / "config.json").read_text()
        return
    reason = ATTENTION_RULES[rule].export_refusal or "visible_fraction=0.5"
    with pytest.raises(ConfigError, match=reason):
        export(source, model.config, model.attention, None, out)
    assert not out.exists()


def test_the_registry_exports_the_rules_of_the_modelling_file() -> None:
    assert {name for name, rule in ATTENTION_RULES.items() if not rule.export_refusal} == set(EXPORTED_RULES)
