"""Layers over stages: no partition is better, ties are broken as promised, and the costs are those of the model."""

from itertools import combinations, product

import pytest

from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import ConfigError
from aki_megatron.parallel.pipeline_partition import (
    StageCosts,
    balance_layers,
    estimate_costs,
    layer_flops,
    layers_of_stages,
    lm_head_flops,
    resampler_flops,
    vision_flops,
)


def every_partition(layers: int, stages: int) -> list[list[int]]:
    """All ways of giving every stage a layer, as counts."""
    found = []
    for inner in combinations(range(1, layers), stages - 1):
        ends = [0, *inner, layers]
        found.append([after - before for before, after in zip(ends, ends[1:], strict=False)])
    return found


def costliest(counts: list[int], costs: StageCosts) -> float:
    stages = [range(count) for count in counts]
    return max(costs.per_stage(stages))


@pytest.mark.parametrize(("embedder", "head"), list(product((0, 0.5, 1, 2.25, 7, 40), (0, 0.75, 3, 11))))
def test_no_partition_is_better(embedder: float, head: float) -> None:
    costs = StageCosts(input_embedder=embedder, layer=1.0, lm_head=head)
    for layers in range(1, 10):
        for stages in range(1, layers + 1):
            found = balance_layers(layers, stages, costs=costs)
            assert [layer for stage in found for layer in stage] == list(range(layers))
            counts = [len(stage) for stage in found]
            candidates = every_partition(layers, stages)
            best = min(costliest(counts, costs) for counts in candidates)
            # equally good: fewest layers on the first stage, then on the second, ...
            assert counts == min(c for c in candidates if costliest(c, costs) == best)


def test_costs_that_no_float_holds_exactly() -> None:
    costs = StageCosts(input_embedder=0.1 + 0.2, layer=0.1, lm_head=0.3)
    assert [len(stage) for stage in balance_layers(9, 3, costs=costs)] == [2, 5, 2]


def test_more_stages_than_layers() -> None:
    with pytest.raises(ConfigError, match="3 decoder layers cannot be partitioned into 4 stages; choose 1 to 3"):
        balance_layers(3, 4, costs=StageCosts(1, 1, 1))


def test_aki_4b() -> None:
    model = ModelConfig()
    # fine-tuning: 512 text tokens, encoder and resampler cost 1.7 layers, the head two thirds of one
    costs = estimate_costs(model, text_tokens=512)
    assert costs.input_embedder / costs.layer == pytest.approx(1.70, abs=0.01)
    assert costs.lm_head / costs.layer == pytest.approx(0.67, abs=0.01)
    # pretraining: 128 text tokens, and the same image costs over four layers
    short = estimate_costs(model, text_tokens=128)
    assert short.input_embedder == costs.input_embedder
    assert short.input_embedder / short.layer == pytest.approx(4.15, abs=0.01)

    def counts(stages: int, text_tokens: float) -> list[int]:
        return [
            len(s) for s in layers_of_stages(model, num_stages=stages, layers_per_stage=(), text_tokens=text_tokens)
        ]

    assert counts(4, 512) == [6, 9, 9, 8]
    assert counts(4, 128) == [5, 9, 9, 9]
    assert counts(8, 128) == [1, 2, 5, 5, 5, 5, 5, 4]
    assert counts(1, 512) == [32]
    for stages, text_tokens in product((2, 4, 8), (128, 512)):
        assert counts(stages, text_tokens)[0] == min(counts(stages, text_tokens))


def test_more_images_cost_the_input_embedder_and_recompute_costs_the_layers() -> None:
    model = ModelConfig()
    one, two = (estimate_costs(model, text_tokens=256, images=n) for n in (1, 2))
    assert two.input_embedder == pytest.approx(2 * one.input_embedder)
    assert two.lm_head == one.lm_head
    again = estimate_costs(model, text_tokens=256, recompute=True)
    assert again.layer == pytest.approx(4 / 3 * one.layer)
    assert (again.input_embedder, again.lm_head) == (one.input_embedder, one.lm_head)
    assert estimate_costs(model, text_tokens=256, images=0).input_embedder == 0


TINY = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, hidden_size=6, num_layers=2, num_heads=2, intermediate_size=10),
    resampler=ResamplerConfig(num_latents=3, num_layers=2, num_heads=2, head_dim=4, mlp_ratio=2),
    decoder=DecoderConfig(
        hidden_size=16,
        num_layers=5,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=24,
        padded_vocab_size=40,
        vocab_size=38,
        num_added_tokens=2,
        rope=RopeConfig(),
    ),
)


def matmul(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns


def test_the_formulas_count_the_matrix_products_one_by_one() -> None:
    patches, width, latents = 4, 6, 3
    projections = 4 * matmul(patches, width, width)
    attention = matmul(patches, width, patches) + matmul(patches, patches, width)
    mlp = matmul(patches, width, 10) + matmul(patches, 10, width)
    embedding = matmul(patches, 3 * 4 * 4, width)
    assert vision_flops(TINY.vision) == embedding + 2 * (projections + attention + mlp)

    inner, seen = 8, patches + latents
    projections = matmul(latents, width, inner) + matmul(seen, width, 2 * inner) + matmul(latents, inner, width)
    attention = matmul(latents, inner, seen) + matmul(latents, seen, inner)
    mlp = matmul(latents, width, 12) + matmul(latents, 12, width)
    expected = 2 * (projections + attention + mlp) + matmul(latents, width, 16)
    assert resampler_flops(TINY.resampler, TINY.vision, TINY.decoder) == expected

    num_positions = 7
    projections = matmul(num_positions, 16, (4 + 2 * 2) * 4) + matmul(num_positions, 16, 16)
    attention = (
        matmul(num_positions, 16, num_positions) + matmul(num_positions, num_positions, 16)
    ) / 2  # causal: half of the pairs
    mlp = matmul(num_positions, 16, 2 * 24) + matmul(num_positions, 24, 16)
    assert layer_flops(TINY.decoder, num_positions) == projections + attention + mlp

    assert lm_head_flops(TINY.decoder, num_positions) == matmul(num_positions, 16, 42)


def test_forward_and_backward() -> None:
    costs = estimate_costs(TINY, text_tokens=4)
    assert costs.layer == 3 * layer_flops(TINY.decoder, 4 + 3)
    assert costs.lm_head == 3 * lm_head_flops(TINY.decoder, 4)
    # the encoder is frozen
    resampler = resampler_flops(TINY.resampler, TINY.vision, TINY.decoder)
    assert costs.input_embedder == vision_flops(TINY.vision) + 3 * resampler


def test_a_given_partition() -> None:
    stages = layers_of_stages(TINY, num_stages=3, layers_per_stage=(1, 3, 1), text_tokens=4)
    assert stages == [range(0, 1), range(1, 4), range(4, 5)]


@pytest.mark.parametrize(
    ("given", "message_parts"),
    [
        ((1, 4), ["layers_per_stage=[1, 4] has 2 entries", "= 3 stages", "model.decoder.num_layers=5"]),
        ((1, 1, 2, 1), ["has 4 entries", "= 3 stages"]),
        (
            (1, 2, 3),
            ["adds up to 6 layers", "model.decoder.num_layers=5", "3 numbers whose sum is 5", "[] to balance by cost"],
        ),
    ],
)
def test_a_given_partition_that_does_not_fit(given: tuple[int, ...], message_parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        layers_of_stages(TINY, num_stages=3, layers_per_stage=given, text_tokens=4)
    for part in message_parts:
        assert part in str(caught.value)
