"""Batched generation with a KV cache equals recomputing each sequence by itself for every token."""

import pytest
import torch
from torch import Tensor

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.evaluate.generate import GenerationState, generate
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, stack_ids

LATENTS, IMAGE_TOKEN = 4, 41
LONGROPE = RopeConfig(
    rope_type="longrope",
    max_position_embeddings=256,
    original_max_position_embeddings=16,
    short_factor=(1.0, 1.2, 1.5, 2.0),
    long_factor=(2.0, 4.0, 9.0, 30.0),
)


def model(rule: str = "mma", rope: RopeConfig | None = None, num_kv_heads: int = 2) -> Stage:
    config = ModelConfig(
        vision=VisionConfig(
            image_size=12,
            patch_size=4,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            intermediate_size=24,
            pooling_head=False,
        ),
        resampler=ResamplerConfig(num_latents=LATENTS, num_layers=1, num_heads=2, head_dim=8),
        decoder=DecoderConfig(
            hidden_size=32,
            num_layers=3,
            num_heads=4,
            num_kv_heads=num_kv_heads,
            intermediate_size=48,
            padded_vocab_size=45,
            vocab_size=40,
            num_added_tokens=2,
            rope=rope or RopeConfig(),
        ),
    )
    torch.manual_seed(0)
    built = build_model(config, attention=AttentionConfig(rule=rule)).double()
    with torch.no_grad():
        for tensor in built.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return built


def prompt(length: int, image_at: int | None) -> tuple[list[int], list[int]]:
    """Token and modality ids of a prompt, with an image of LATENTS positions at ``image_at``."""
    tokens, modality = torch.randint(0, 40, (length,)).tolist(), [int(Modality.TEXT)] * length
    if image_at is not None:
        tokens[image_at:image_at] = [IMAGE_TOKEN] * LATENTS
        modality[image_at:image_at] = [int(Modality.IMAGE)] * LATENTS
    return tokens, modality


def batch(sequences: list[tuple[list[int], list[int]]], pixels: Tensor) -> Batch:
    longest = max(len(tokens) for tokens, _ in sequences)

    def padded(values: list[int], value: int) -> list[int]:
        return values + [value] * (longest - len(values))

    return Batch(
        torch.tensor([padded(tokens, 39) for tokens, _ in sequences]),
        torch.tensor([padded(modality, Modality.PAD) for _, modality in sequences], dtype=torch.int8),
        torch.tensor([padded([0] * len(tokens), NO_SEGMENT) for tokens, _ in sequences], dtype=torch.int32),
        torch.tensor([padded(list(range(len(tokens))), 0) for tokens, _ in sequences], dtype=torch.int32),
        torch.full((len(sequences), longest), IGNORE),
        {Modality.IMAGE: pixels},
    )


def recomputed(stage: Stage, sequence: tuple[list[int], list[int]], pixels: Tensor, new_tokens: int) -> list[int]:
    """Generate for one sequence without cache and padding: a full forward pass for every token."""
    tokens, modality = list(sequence[0]), list(sequence[1])
    for _ in range(new_tokens):
        so_far = batch([(tokens, modality)], pixels)
        with torch.no_grad():
            logits = stage.logits(so_far.token_ids, stack_ids(so_far), so_far.media)
        tokens.append(int(logits[0, -1].argmax()))
        modality.append(int(Modality.RESPONSE))
    return tokens[len(sequence[0]) :]


PROMPTS = [(9, 3), (4, None), (12, 1), (1, None), (6, 6)]
"""Length of the prompt's text and index of its image."""


@pytest.mark.parametrize("rule", ["causal", "mma", "cca"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_equals_recomputation_of_each_sequence(rule: str, num_kv_heads: int) -> None:
    stage = model(rule, num_kv_heads=num_kv_heads)
    torch.manual_seed(1)
    sequences = [prompt(length, at) for length, at in PROMPTS]
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    images = iter(pixels)
    own_pixels = [next(images)[None] if at is not None else pixels[:0] for _, at in PROMPTS]
    expected = [recomputed(stage, sequence, image, 8) for sequence, image in zip(sequences, own_pixels, strict=True)]
    assert generate(stage, batch(sequences, pixels), stop_ids=(), max_new_tokens=8) == expected
    assert len({tuple(generated) for generated in expected}) == len(PROMPTS)


@pytest.mark.parametrize("rule", ["mma", "mma_general", "mixed", "cca"])
def test_several_images_and_turns_equal_recomputation(rule: str) -> None:
    stage = model(rule)
    torch.manual_seed(2)
    answer = ([7, 8], [int(Modality.RESPONSE)] * 2)
    two_images = [prompt(1, 0), prompt(4, 1)]
    three_in_two_turns = [prompt(2, 1), prompt(3, 0), answer, prompt(5, 2)]
    sequences = [
        (sum((tokens for tokens, _ in parts), []), sum((kinds for _, kinds in parts), []))
        for parts in (two_images, [prompt(6, None)], three_in_two_turns)
    ]
    pixels = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    own_pixels = (pixels[:2], pixels[:0], pixels[2:])
    expected = [recomputed(stage, sequence, images, 8) for sequence, images in zip(sequences, own_pixels, strict=True)]
    assert generate(stage, batch(sequences, pixels), stop_ids=(), max_new_tokens=8) == expected
    swapped = generate(stage, batch(sequences, pixels.flip(0)), stop_ids=(), max_new_tokens=8)
    assert swapped != expected and swapped[1] == expected[1]


def test_the_rule_reaches_generation() -> None:
    """Under another rule the first new token's logits differ for a prompt with an image."""
    torch.manual_seed(1)
    given = batch([prompt(9, 3)], torch.randn(1, 3, 12, 12, dtype=torch.float64))
    causal, mutual = (GenerationState(model(rule), given, 1).prefill() for rule in ("causal", "mma"))
    assert (causal - mutual)[:, :42].abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [(10, 4), (16, 15), (17, 3)])
def test_longrope_is_recomputed_when_a_sequence_outgrows_its_short_factors(lengths: tuple[int, int]) -> None:
    stage = model(rope=LONGROPE)
    torch.manual_seed(1)
    sequences = [prompt(length, None) for length in lengths]
    none = torch.zeros(0, 3, 12, 12, dtype=torch.float64)
    expected = [recomputed(stage, sequence, none, 9) for sequence in sequences]
    assert generate(stage, batch(sequences, none), stop_ids=(), max_new_tokens=9) == expected


def test_a_sequence_ends_before_its_stop_id_and_others_continue() -> None:
    stage = model()
    torch.manual_seed(2)
    given = batch([prompt(9, 3), prompt(5, None)], torch.randn(1, 3, 12, 12, dtype=torch.float64))
    first, second = generate(stage, given, stop_ids=(), max_new_tokens=10)
    stop = next(token for token in first[1:] if token not in second)
    stopped, continued = generate(stage, given, stop_ids={stop}, max_new_tokens=10)
    assert stopped == first[: first.index(stop)]
    assert continued == second
    assert generate(stage, given, stop_ids={first[0], second[0]}, max_new_tokens=10) == [[], []]
    assert generate(stage, given, stop_ids=(), max_new_tokens=0) == [[], []]


def test_step_logits_equal_one_pass_over_the_whole_text() -> None:
    stage = model()
    torch.manual_seed(3)
    tokens, modality = prompt(7, 2)
    pixels = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    state = GenerationState(stage, batch([(tokens, modality)], pixels), 6)
    steps, chosen = [state.prefill()], torch.randint(0, 42, (6,))
    steps += [state.decode_step(token[None]) for token in chosen]
    whole = batch([(tokens + chosen.tolist(), modality + [int(Modality.RESPONSE)] * 6)], pixels)
    with torch.no_grad():
        expected = stage.logits(whole.token_ids, stack_ids(whole), whole.media)[0, len(tokens) - 1 :]
    torch.testing.assert_close(torch.cat(steps)[:, :42], expected[:, :42], rtol=1e-10, atol=1e-10)


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    stage = model()
    given = batch([prompt(5, None), prompt(5, None)], torch.zeros(0, 3, 12, 12))
    for sequence, position, segment in ((1, 3, 1), (1, 0, NO_SEGMENT)):
        segment_ids = given.segment_ids.clone()
        segment_ids[sequence, position] = segment
        packed = Batch(given.token_ids, given.modality_ids, segment_ids, given.position_ids, given.targets, given.media)
        with pytest.raises(ValueError, match="sequence 1 is not"):
            generate(stage, packed, stop_ids=(), max_new_tokens=2)
