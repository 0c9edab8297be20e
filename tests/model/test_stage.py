"""The whole model: sizes, gradients for every kind of batch, stages, tied and added parameters."""

import copy
import math

import pytest
import torch
from tiny_model import CONFIG, IMAGE_TOKEN, fine_tuning_batch, tiny
from torch import Tensor, nn

from aki_megatron.attention import LeakError
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.model.linears import first_argmax
from aki_megatron.model.stage import Stage, build_model, build_stage, global_names, scatter_media_embeds
from aki_megatron.types import IGNORE, Batch, Modality, StackedIds, stack_ids

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def built(config: ModelConfig = CONFIG, rule: str = "mma", dtype: torch.dtype = torch.float64) -> Stage:
    torch.manual_seed(0)
    return build_model(config, attention=AttentionConfig(rule=rule)).to(dtype)


def loss_of(model: Stage, batch: Batch) -> Tensor:
    return model(batch.token_ids, stack_ids(batch), batch.media)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_next_tokens_are_the_first_of_the_largest_logits(dtype: torch.dtype) -> None:
    model, batch = built(dtype=dtype), fine_tuning_batch()
    media = {modality: items.to(dtype) for modality, items in batch.media.items()}
    with torch.no_grad():
        logits = model.logits(batch.token_ids, stack_ids(batch), media)[batch.targets != IGNORE]
        tokens = model.next_tokens(batch.token_ids, stack_ids(batch), media)
    assert torch.equal(logits.gather(-1, tokens[:, None]).squeeze(-1), logits.amax(-1)) and len(tokens) == 14
    ties = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-math.inf, -1.0, -math.inf, -1.0]], dtype=dtype)
    assert first_argmax(ties).tolist() == [1, 0, 1]
    assert first_argmax(ties[:0]).shape == (0,)


def test_default_is_aki_4b_to_the_last_parameter() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(), attention=AttentionConfig(rule="mma"))
    vision, resampler = count(model.input_embedder.vision_encoder), count(model.input_embedder.resampler)
    assert (vision, resampler) == (428_225_600, 81_608_448)
    assert count(model) - vision - resampler == 3_821_123_906
    assert count(model) == 4_330_957_954
    assert len(model.state_dict()) == 718


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_every_trainable_gradient(dtype: torch.dtype) -> None:
    model = built(dtype=dtype)
    batch = fine_tuning_batch()
    loss = loss_of(model, batch)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 2 < loss.item() / batch.supervised_tokens < 8
    loss.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("input_embedder.vision_encoder"):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # the image token's own vector is replaced by the image, and no other added token is in the batch
            assert parameter.grad.any() == (name != "input_embedder.token_embedding.added_tokens"), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("media", ["none", "empty", "images"])
@pytest.mark.parametrize("supervised", [True, False])
def test_every_parameter_takes_part_whatever_is_missing(dtype: torch.dtype, media: str, supervised: bool) -> None:
    model = built(dtype=dtype)
    batch = fine_tuning_batch(images=media == "images", supervised=supervised)
    loss = model(batch.token_ids, stack_ids(batch), {} if media == "none" else batch.media)
    loss.backward()
    assert (loss.item() == 0) == (not supervised)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        if not supervised or (media != "images" and name.startswith("input_embedder.resampler")):
            assert not parameter.grad.any(), name


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, batch = built(), fine_tuning_batch()
    with torch.no_grad():
        logits = model.logits(batch.token_ids, stack_ids(batch), batch.media)
        log_probs = logits.log_softmax(-1)
        supervised = (batch.targets != IGNORE).nonzero(as_tuple=True)
        expected = -log_probs[(*supervised, batch.targets[supervised])].sum()
        torch.testing.assert_close(loss_of(model, batch), expected, rtol=1e-12, atol=0)


def test_logits_of_padding_columns_are_minus_infinity() -> None:
    model, batch = built(), fine_tuning_batch()
    lm_head = model.lm_head
    with torch.no_grad():
        lm_head.added_tokens.bias.copy_(torch.tensor([3.0, 5.0]))
        logits = model.logits(batch.token_ids, stack_ids(batch), batch.media)
        hidden = torch.randn(2, 32, dtype=torch.float64)
        normed = lm_head.norm(hidden)
        torch.testing.assert_close(lm_head.logits(hidden)[:, :40], lm_head.base(normed)[:, :40])
        torch.testing.assert_close(lm_head.logits(hidden)[:, 40:42], lm_head.added_tokens(normed))
    assert logits.shape[-1] == 45
    assert torch.isneginf(logits[..., 42:]).all()
    assert logits[..., :42].isfinite().all()


def test_added_tokens_are_looked_up_in_their_own_table() -> None:
    embedding = built().input_embedder.token_embedding
    ids = torch.tensor([[0, 40, 39, 41]])
    expected = torch.stack(
        [embedding.base.weight[0], embedding.added_tokens[0], embedding.base.weight[39], embedding.added_tokens[1]]
    )
    assert torch.equal(embedding(ids)[0], expected)


def test_without_added_tokens() -> None:
    model = built(tiny(vocab_size=45, num_added_tokens=0, lm_head_bias=False))
    batch = fine_tuning_batch()
    loss_of(model, batch).backward()
    assert model.input_embedder.token_embedding.added_tokens is None
    assert model.lm_head.added_tokens is None
    assert model.lm_head.base.bias is None
    assert not any("added_tokens" in name or "bias" in name for name in model.lm_head.state_dict())


@pytest.mark.parametrize("num_added_tokens", [0, 2])
def test_tied_tables_are_one_parameter(num_added_tokens: int) -> None:
    model = built(tiny(tie_word_embeddings=True, num_added_tokens=num_added_tokens))
    batch = fine_tuning_batch()
    if num_added_tokens == 0:
        batch.token_ids[batch.token_ids == IMAGE_TOKEN] = 0
    loss_of(model, batch).backward()
    names = [name for name, _ in model.named_parameters()]
    assert "input_embedder.token_embedding.base.weight" in names
    assert "lm_head.base.weight" not in names
    assert "lm_head.added_tokens.weight" not in names
    untied = built(tiny(num_added_tokens=num_added_tokens))
    untied.load_state_dict(model.state_dict())
    loss_of(untied, batch).backward()
    both = untied.input_embedder.token_embedding.base.weight.grad + untied.lm_head.base.weight.grad
    torch.testing.assert_close(model.input_embedder.token_embedding.base.weight.grad, both)


def test_images_fill_their_positions_in_order() -> None:
    text = torch.zeros(2, 4, 3)
    images = torch.arange(12.0).view(2, 2, 3) + 1
    image = int(Modality.IMAGE)
    modality = torch.tensor([[1, image, image, 1], [image, 1, image, 2]])
    embeds = scatter_media_embeds(text, images, modality, Modality.IMAGE)
    assert torch.equal(embeds[0, 1:3], images[0])
    assert torch.equal(embeds[1, [0, 2]], images[1])
    assert not embeds[0, [0, 3]].any()
    assert not embeds[1, [1, 3]].any()
    modality[1, 0] = Modality.TEXT
    with pytest.raises(ValueError, match="3 IMAGE positions but 2 items of 2 latents"):
        scatter_media_embeds(text, images, modality, Modality.IMAGE)


def test_sequences_do_not_depend_on_their_neighbours_or_on_padding() -> None:
    model, batch = built(), fine_tuning_batch()
    images = iter(range(2))
    with torch.no_grad():
        together = model.logits(batch.token_ids, stack_ids(batch), batch.media)
        for index in range(3):
            length = int((batch.segment_ids[index] >= 0).sum())
            own_images = [next(images)] if (batch.modality_ids[index] == Modality.IMAGE).any() else []
            ids = StackedIds(stack_ids(batch).stacked[index : index + 1]).prefix(length)
            alone = model.logits(
                batch.token_ids[index : index + 1, :length],
                ids,
                {Modality.IMAGE: batch.media[Modality.IMAGE][own_images]},
            )
            torch.testing.assert_close(together[index, :length], alone[0], rtol=1e-10, atol=1e-10)


def test_an_answer_token_changes_nothing_before_it() -> None:
    """Leak test on the whole model: only logits from the changed token on change."""
    model, batch = built(), fine_tuning_batch()
    changed = batch.token_ids.clone()
    position = int((batch.modality_ids[0] == Modality.RESPONSE).nonzero()[1])
    changed[0, position] = (changed[0, position] + 1) % 39
    with torch.no_grad():
        before = model.logits(batch.token_ids, stack_ids(batch), batch.media)[..., :42]
        after = model.logits(changed, stack_ids(batch), batch.media)[..., :42]
    moved = (before != after).any(-1)[0].nonzero().flatten()
    assert int(moved.min()) == position


def test_the_rule_reaches_the_attention() -> None:
    batch = fine_tuning_batch()
    assert abs(loss_of(built(rule="mma"), batch).item() - loss_of(built(rule="causal"), batch).item()) > 1e-6
    captions = batch.modality_ids.masked_fill(batch.modality_ids == Modality.TEXT, Modality.RESPONSE)
    batch = Batch(batch.token_ids, captions, batch.segment_ids, batch.position_ids, batch.targets, batch.media)
    assert loss_of(built(rule="mma"), batch).item() == loss_of(built(rule="causal"), batch).item()


def test_a_rule_that_shows_the_target_is_an_error() -> None:
    batch = fine_tuning_batch()
    targets = batch.targets.clone()
    targets[0, 3] = 5  # an image position that is supervised with a token of its own question
    leaky = Batch(batch.token_ids, batch.modality_ids, batch.segment_ids, batch.position_ids, targets, batch.media)
    with pytest.raises(LeakError):
        loss_of(built(), leaky)


@pytest.mark.parametrize("first_layers", [(1,), (2,), (1, 2)])
def test_consecutive_stages_equal_the_whole_model(first_layers: tuple[int, ...]) -> None:
    """Only hidden states and ids cross stages; names and initial weights do not depend on the partition."""
    whole, batch = built(), fine_tuning_batch()
    edges = [0, *first_layers, CONFIG.decoder.num_layers]
    stages = [
        build_stage(CONFIG, range(first, last), attention=AttentionConfig(rule="mma")).double()
        for first, last in zip(edges, edges[1:], strict=False)
    ]
    state = {name: tensor for stage in stages for name, tensor in stage.state_dict().items()}
    assert sorted(state) == sorted(whole.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
    hidden, ids = batch.token_ids, stack_ids(batch)
    for number, stage in enumerate(stages):
        hidden = stage(hidden, ids, batch.media if number == 0 else {})
    expected = loss_of(whole, batch)
    assert torch.equal(hidden, expected)
    hidden.backward()
    expected.backward()
    got = {name: parameter.grad for stage in stages for name, parameter in stage.named_parameters()}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-12, atol=1e-12)


def test_the_seed_alone_decides_the_weights() -> None:
    one, two = built().state_dict(), built().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_model(CONFIG, attention=AttentionConfig(rule="mma"), seed=1).double().state_dict()
    assert not torch.equal(one["layers.0.attention.qkv_proj.weight"], other["layers.0.attention.qkv_proj.weight"])


EIGHTH_WEIGHTS = {
    "input_embedder.vision_encoder.layers.1.attention.q_proj.weight": -0.0744599997997284,
    "input_embedder.resampler.latents": 1.069453477859497,
    "input_embedder.token_embedding.base.weight": -0.006834643892943859,
    "input_embedder.token_embedding.added_tokens": -0.013748726807534695,
    "layers.2.mlp.down_proj.weight": -0.08993624895811081,
    "lm_head.base.weight": 0.13051612675189972,
}
"""Eighth element of some parameters of a model with seed 3, from a version with other module names."""


def test_initial_weights_do_not_depend_on_module_names() -> None:
    parameters = dict(build_model(CONFIG, attention=AttentionConfig(rule="mma"), seed=3).named_parameters())
    assert {name: parameters[name].flatten()[7].item() for name in EIGHTH_WEIGHTS} == EIGHTH_WEIGHTS


def test_initialization_is_scaled() -> None:
    torch.manual_seed(0)
    config = tiny(hidden_size=256, num_heads=8, intermediate_size=512, num_layers=2, padded_vocab_size=500)
    model = build_model(config, attention=AttentionConfig(rule="causal"))
    layer = model.layers["0"]
    residual = (2 * 2) ** -0.5
    for weight, std in (
        (model.input_embedder.token_embedding.base.weight, 0.02),
        (model.input_embedder.token_embedding.added_tokens, 0.02),
        (layer.attention.qkv_proj.weight, 256**-0.5),
        (layer.attention.out_proj.weight, 256**-0.5 * residual),
        (layer.mlp.gate_up_proj.weight, 256**-0.5),
        (layer.mlp.down_proj.weight, 512**-0.5 * residual),
        (model.lm_head.base.weight, 256**-0.5),
        (model.input_embedder.resampler.latents, 1.0),
    ):
        assert abs(weight.std().item() / std - 1) < 0.15
        assert abs(weight.mean().item()) < 0.15 * std
    assert not model.lm_head.base.bias.any()
    assert not model.lm_head.added_tokens.bias.any()
    assert (layer.attention_norm.weight == 1).all()


def test_bf16_is_close_to_fp32() -> None:
    batch = fine_tuning_batch()
    exact = loss_of(built(dtype=torch.float32), batch).item()
    assert abs(loss_of(built(dtype=torch.bfloat16), batch).item() / exact - 1) < 0.02


def test_casting_and_copying_keep_rotary_angles_exact() -> None:
    """Rotary frequencies are not buffers: a model cast to bf16 and back rotates by the same angles."""
    model, batch = built(dtype=torch.float32), fine_tuning_batch()
    restored = copy.deepcopy(model).bfloat16().float()
    positions = batch.position_ids.int() + 3000
    for got, expected in zip(
        restored.rotary(positions, batch.segment_ids, torch.float32),
        model.rotary(positions, batch.segment_ids, torch.float32),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_a_last_stage_with_a_tied_lm_head_has_a_copy_of_the_tables() -> None:
    config = tiny(tie_word_embeddings=True, lm_head_bias=False)
    first, last = (
        build_stage(config, [layer], attention=AttentionConfig(rule="mma"))
        for layer in (0, config.decoder.num_layers - 1)
    )
    assert last.lm_head is not None and first.input_embedder is not None
    assert torch.equal(last.lm_head.base.weight, first.input_embedder.token_embedding.base.weight)
    names = global_names(last)
    assert names["lm_head.base.weight"] == "input_embedder.token_embedding.base.weight"
    assert names["lm_head.added_tokens.weight"] == "input_embedder.token_embedding.added_tokens"
    assert names["lm_head.norm.weight"] == "lm_head.norm.weight"
    whole = build_model(config, attention=AttentionConfig(rule="mma"))
    assert set(global_names(whole)) == set(global_names(whole).values())


@pytest.mark.parametrize("rule", ["causal", "mma"])
def test_recomputing_layers_changes_no_gradient(rule: str) -> None:
    plain, recomputing = built(rule=rule), built(rule=rule)
    recomputing.recompute = True
    runs = [0]
    recomputing.layers["1"].register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    batch = fine_tuning_batch()
    for model in (plain, recomputing):
        loss_of(model, batch).backward()
    assert runs == [2], "one forward pass and one recomputation"
    for (name, one), other in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad), name
