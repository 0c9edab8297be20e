"""The whole model: sizes, gradients of every batch a rank may meet, what belongs to whom."""

import copy

import pytest
import torch
from tiny_model import CONFIG, IMAGE_TOKEN, fine_tuning_batch, tiny
from torch import Tensor, nn

from aki_megatron.attention import LeakError
from aki_megatron.config.model import ModelConfig
from aki_megatron.model.stage import Stage, build_model, build_stage, global_names, scatter_image_embeds
from aki_megatron.types import IGNORE, Batch, Modality, stack_ids

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def built(config: ModelConfig = CONFIG, rule: str = "mma", dtype: torch.dtype = torch.float64) -> Stage:
    torch.manual_seed(0)
    return build_model(config, rule=rule).to(dtype)


def loss_of(model: Stage, batch: Batch) -> Tensor:
    return model(batch.token_ids, stack_ids(batch), batch.pixels)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_default_is_aki_4b_to_the_last_parameter() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(), rule="mma")
    vision, resampler = count(model.front.vision), count(model.front.resampler)
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
        if name.startswith("front.vision"):
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            # the image token's own vector is replaced by the image, and no other added token is in the batch
            assert parameter.grad.any() == (name != "front.embedding.extra"), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pixels", ["none", "empty", "images"])
@pytest.mark.parametrize("supervised", [True, False])
def test_every_parameter_takes_part_whatever_is_missing(dtype: torch.dtype, pixels: str, supervised: bool) -> None:
    model = built(dtype=dtype)
    batch = fine_tuning_batch(images=pixels == "images", supervised=supervised)
    loss = model(batch.token_ids, stack_ids(batch), None if pixels == "none" else batch.pixels)
    loss.backward()
    assert (loss.item() == 0) == (not supervised)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        if not supervised or (pixels != "images" and name.startswith("front.resampler")):
            assert not parameter.grad.any(), name


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, batch = built(), fine_tuning_batch()
    with torch.no_grad():
        logits = model.logits(batch.token_ids, stack_ids(batch), batch.pixels)
        scores = logits.log_softmax(-1)
        rows, places = (batch.targets != IGNORE).nonzero(as_tuple=True)
        expected = -scores[rows, places, batch.targets[rows, places]].sum()
        torch.testing.assert_close(loss_of(model, batch), expected, rtol=1e-12, atol=0)


def test_columns_are_tokens_and_unused_ones_are_impossible() -> None:
    model, batch = built(), fine_tuning_batch()
    head = model.head
    with torch.no_grad():
        head.extra.bias.copy_(torch.tensor([3.0, 5.0]))
        logits = model.logits(batch.token_ids, stack_ids(batch), batch.pixels)
        hidden = torch.randn(2, 32, dtype=torch.float64)
        normed = head.norm(hidden)
        torch.testing.assert_close(head.logits(hidden)[:, :40], head.output(normed)[:, :40])
        torch.testing.assert_close(head.logits(hidden)[:, 40:42], head.extra(normed))
    assert logits.shape[-1] == 45
    assert torch.isneginf(logits[..., 42:]).all()
    assert logits[..., :42].isfinite().all()


def test_added_ids_read_rows_of_their_own() -> None:
    embedding = built().front.embedding
    ids = torch.tensor([[0, 40, 39, 41]])
    expected = torch.stack(
        [embedding.table.weight[0], embedding.extra[0], embedding.table.weight[39], embedding.extra[1]]
    )
    assert torch.equal(embedding(ids)[0], expected)


def test_without_added_tokens_the_tables_are_all() -> None:
    model = built(tiny(vocab_size=45, num_added_tokens=0, lm_head_bias=False))
    batch = fine_tuning_batch()
    loss_of(model, batch).backward()
    assert model.front.embedding.extra is None
    assert model.head.extra is None
    assert model.head.output.bias is None
    assert not any("extra" in name or "bias" in name for name in model.head.state_dict())


@pytest.mark.parametrize("num_added_tokens", [0, 2])
def test_tied_tables_are_one_parameter(num_added_tokens: int) -> None:
    model = built(tiny(tie_word_embeddings=True, num_added_tokens=num_added_tokens))
    batch = fine_tuning_batch()
    if num_added_tokens == 0:
        batch.token_ids[batch.token_ids == IMAGE_TOKEN] = 0
    loss_of(model, batch).backward()
    names = [name for name, _ in model.named_parameters()]
    assert "front.embedding.table.weight" in names
    assert "head.output.weight" not in names
    assert "head.extra.weight" not in names
    untied = built(tiny(num_added_tokens=num_added_tokens))
    untied.load_state_dict(model.state_dict())
    loss_of(untied, batch).backward()
    both = untied.front.embedding.table.weight.grad + untied.head.output.weight.grad
    torch.testing.assert_close(model.front.embedding.table.weight.grad, both)


def test_images_fill_their_places_in_order() -> None:
    text = torch.zeros(2, 4, 3)
    images = torch.arange(12.0).view(2, 2, 3) + 1
    image = int(Modality.IMAGE)
    modality = torch.tensor([[1, image, image, 1], [image, 1, image, 2]])
    placed = scatter_image_embeds(text, images, modality)
    assert torch.equal(placed[0, 1:3], images[0])
    assert torch.equal(placed[1, [0, 2]], images[1])
    assert not placed[0, [0, 3]].any()
    assert not placed[1, [1, 3]].any()
    modality[1, 0] = Modality.TEXT
    with pytest.raises(ValueError, match="3 IMAGE places but 2 images of 2 latents"):
        scatter_image_embeds(text, images, modality)


def test_rows_do_not_depend_on_their_neighbours_or_on_padding() -> None:
    model, batch = built(), fine_tuning_batch()
    images = iter(range(2))
    with torch.no_grad():
        together = model.logits(batch.token_ids, stack_ids(batch), batch.pixels)
        for row in range(3):
            length = int((batch.segment_ids[row] >= 0).sum())
            at = [next(images)] if (batch.modality_ids[row] == Modality.IMAGE).any() else []
            ids = stack_ids(batch)[row : row + 1, :length]
            alone = model.logits(batch.token_ids[row : row + 1, :length], ids, batch.pixels[at])
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-10, atol=1e-10)


def test_an_answer_token_changes_nothing_before_it() -> None:
    """The leak test, on the whole model: only logits from the changed token on move."""
    model, batch = built(), fine_tuning_batch()
    changed = batch.token_ids.clone()
    place = int((batch.modality_ids[0] == Modality.RESPONSE).nonzero()[1])
    changed[0, place] = (changed[0, place] + 1) % 39
    with torch.no_grad():
        before = model.logits(batch.token_ids, stack_ids(batch), batch.pixels)[..., :42]
        after = model.logits(changed, stack_ids(batch), batch.pixels)[..., :42]
    moved = (before != after).any(-1)[0].nonzero().flatten()
    assert int(moved.min()) == place


def test_the_rule_reaches_the_attention() -> None:
    batch = fine_tuning_batch()
    assert abs(loss_of(built(rule="mma"), batch).item() - loss_of(built(rule="causal"), batch).item()) > 1e-6
    captions = batch.modality_ids.masked_fill(batch.modality_ids == Modality.TEXT, Modality.RESPONSE)
    batch = Batch(batch.token_ids, captions, batch.segment_ids, batch.position_ids, batch.targets, batch.pixels)
    assert loss_of(built(rule="mma"), batch).item() == loss_of(built(rule="causal"), batch).item()


def test_a_rule_that_shows_the_target_is_an_error() -> None:
    batch = fine_tuning_batch()
    targets = batch.targets.clone()
    targets[0, 3] = 5  # an image place that is to predict what its own question says
    leaky = Batch(batch.token_ids, batch.modality_ids, batch.segment_ids, batch.position_ids, targets, batch.pixels)
    with pytest.raises(LeakError):
        loss_of(built(), leaky)


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_stages_in_a_row_are_the_whole(cuts: tuple[int, ...]) -> None:
    """Only hidden states and ids cross a cut; names and initial weights do not depend on it."""
    whole, batch = built(), fine_tuning_batch()
    edges = [0, *cuts, CONFIG.decoder.num_layers]
    stages = [
        build_stage(CONFIG, range(first, last), rule="mma").double()
        for first, last in zip(edges, edges[1:], strict=False)
    ]
    pieces = {name: tensor for stage in stages for name, tensor in stage.state_dict().items()}
    assert sorted(pieces) == sorted(whole.state_dict())
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.state_dict().items())
    carried, ids = batch.token_ids, stack_ids(batch)
    for number, stage in enumerate(stages):
        carried = stage(carried, ids, batch.pixels if number == 0 else None)
    expected = loss_of(whole, batch)
    assert torch.equal(carried, expected)
    carried.backward()
    expected.backward()
    got = {name: parameter.grad for stage in stages for name, parameter in stage.named_parameters()}
    for name, parameter in whole.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-12, atol=1e-12)


def test_the_seed_alone_decides_the_weights() -> None:
    one, two = built().state_dict(), built().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = build_model(CONFIG, rule="mma", seed=1).double().state_dict()
    assert not torch.equal(one["blocks.0.attention.qkv.weight"], other["blocks.0.attention.qkv.weight"])


def test_initialization_is_scaled() -> None:
    torch.manual_seed(0)
    config = tiny(hidden_size=256, num_heads=8, intermediate_size=512, num_layers=2, padded_vocab_size=500)
    model = build_model(config, rule="causal")
    block = model.blocks["0"]
    residual = (2 * 2) ** -0.5
    for weight, std in (
        (model.front.embedding.table.weight, 0.02),
        (model.front.embedding.extra, 0.02),
        (block.attention.qkv.weight, 256**-0.5),
        (block.attention.out.weight, 256**-0.5 * residual),
        (block.feed_forward.gate_up.weight, 256**-0.5),
        (block.feed_forward.down.weight, 512**-0.5 * residual),
        (model.head.output.weight, 256**-0.5),
        (model.front.resampler.latents, 1.0),
    ):
        assert abs(weight.std().item() / std - 1) < 0.15
        assert abs(weight.mean().item()) < 0.15 * std
    assert not model.head.output.bias.any()
    assert not model.head.extra.bias.any()
    assert (block.attention_norm.weight == 1).all()


def test_bf16_is_close_to_fp32() -> None:
    batch = fine_tuning_batch()
    exact = loss_of(built(dtype=torch.float32), batch).item()
    assert abs(loss_of(built(dtype=torch.bfloat16), batch).item() / exact - 1) < 0.02


def test_casting_and_copying_leave_the_rotation_exact() -> None:
    """Rotary frequencies are no buffers: a model cast to bf16 and back turns by the same angles."""
    model, batch = built(dtype=torch.float32), fine_tuning_batch()
    there = copy.deepcopy(model).bfloat16().float()
    positions = batch.position_ids.int() + 3000
    for got, expected in zip(
        there.rotary(positions, batch.segment_ids, torch.float32),
        model.rotary(positions, batch.segment_ids, torch.float32),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_a_stage_with_a_tied_head_alone_has_a_copy_of_the_tables() -> None:
    config = tiny(tie_word_embeddings=True, lm_head_bias=False)
    first, last = (build_stage(config, [layer], rule="mma") for layer in (0, config.decoder.num_layers - 1))
    assert last.head is not None and first.front is not None
    assert torch.equal(last.head.output.weight, first.front.embedding.table.weight)
    names = global_names(last)
    assert names["head.output.weight"] == "front.embedding.table.weight"
    assert names["head.extra.weight"] == "front.embedding.extra"
    assert names["head.norm.weight"] == "head.norm.weight"
    whole = build_model(config, rule="mma")
    assert set(global_names(whole)) == set(global_names(whole).values())


@pytest.mark.parametrize("rule", ["causal", "mma"])
def test_recomputing_layers_changes_no_gradient(rule: str) -> None:
    plain, again = built(rule=rule), built(rule=rule)
    again.recompute = True
    runs = [0]
    again.blocks["1"].register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    batch = fine_tuning_batch()
    for model in (plain, again):
        loss_of(model, batch).backward()
    assert runs == [2], "the layer runs once forward and once more for its gradients"
    for (name, one), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert one.grad is None or torch.equal(one.grad, other.grad), name
