"""Generation equals recomputing everything for every token, row by row."""

import pytest
import torch
from torch import Tensor

from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.evaluate.generate import Continuation, generate
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
    made = build_model(config, rule=rule).double()
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return made


def prompt(length: int, image_at: int | None) -> tuple[list[int], list[int]]:
    """Token and modality ids of a prompt, an image of LATENTS places at ``image_at``."""
    tokens, modality = torch.randint(0, 40, (length,)).tolist(), [int(Modality.TEXT)] * length
    if image_at is not None:
        tokens[image_at:image_at] = [IMAGE_TOKEN] * LATENTS
        modality[image_at:image_at] = [int(Modality.IMAGE)] * LATENTS
    return tokens, modality


def batch(rows: list[tuple[list[int], list[int]]], pixels: Tensor) -> Batch:
    width = max(len(tokens) for tokens, _ in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    return Batch(
        torch.tensor([padded(tokens, 39) for tokens, _ in rows]),
        torch.tensor([padded(modality, Modality.PAD) for _, modality in rows], dtype=torch.int8),
        torch.tensor([padded([0] * len(tokens), NO_SEGMENT) for tokens, _ in rows], dtype=torch.int32),
        torch.tensor([padded(list(range(len(tokens))), 0) for tokens, _ in rows], dtype=torch.int32),
        torch.full((len(rows), width), IGNORE),
        pixels,
    )


def recomputed(stage: Stage, row: tuple[list[int], list[int]], pixels: Tensor, new_tokens: int) -> list[int]:
    """One row, no cache, no padding: the whole sequence again for every token."""
    tokens, modality = list(row[0]), list(row[1])
    for _ in range(new_tokens):
        given = batch([(tokens, modality)], pixels)
        with torch.no_grad():
            logits = stage.logits(given.token_ids, stack_ids(given), given.pixels)
        tokens.append(int(logits[0, -1].argmax()))
        modality.append(int(Modality.RESPONSE))
    return tokens[len(row[0]) :]


ROWS = [(9, 3), (4, None), (12, 1), (1, None), (6, 6)]
"""Prompt lengths and where their image is."""


@pytest.mark.parametrize("rule", ["causal", "mma"])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_equals_recomputation_row_by_row(rule: str, num_kv_heads: int) -> None:
    stage = model(rule, num_kv_heads=num_kv_heads)
    torch.manual_seed(1)
    rows = [prompt(length, at) for length, at in ROWS]
    pixels = torch.randn(3, 3, 12, 12, dtype=torch.float64)
    images = iter(pixels)
    alone = [next(images)[None] if at is not None else pixels[:0] for _, at in ROWS]
    expected = [recomputed(stage, row, image, 8) for row, image in zip(rows, alone, strict=True)]
    assert generate(stage, batch(rows, pixels), stop_ids=(), max_new_tokens=8) == expected
    assert len({tuple(answer) for answer in expected}) == len(ROWS)


def test_the_rule_reaches_generation() -> None:
    """The negative twin: under another rule the first new token's logits differ for a row with an image."""
    torch.manual_seed(1)
    given = batch([prompt(9, 3)], torch.randn(1, 3, 12, 12, dtype=torch.float64))
    causal, mutual = (Continuation(model(rule), given, 1).start() for rule in ("causal", "mma"))
    assert (causal - mutual)[:, :42].abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [(10, 4), (16, 15), (17, 3)])
def test_longrope_is_recomputed_where_a_row_outgrows_its_short_factors(lengths: tuple[int, int]) -> None:
    stage = model(rope=LONGROPE)
    torch.manual_seed(1)
    rows = [prompt(length, None) for length in lengths]
    none = torch.zeros(0, 3, 12, 12, dtype=torch.float64)
    expected = [recomputed(stage, row, none, 9) for row in rows]
    assert generate(stage, batch(rows, none), stop_ids=(), max_new_tokens=9) == expected


def test_a_row_ends_before_its_stop_id_and_others_go_on() -> None:
    stage = model()
    torch.manual_seed(2)
    given = batch([prompt(9, 3), prompt(5, None)], torch.randn(1, 3, 12, 12, dtype=torch.float64))
    first, second = generate(stage, given, stop_ids=(), max_new_tokens=10)
    stop = next(token for token in first[1:] if token not in second)
    cut, whole = generate(stage, given, stop_ids={stop}, max_new_tokens=10)
    assert cut == first[: first.index(stop)]
    assert whole == second
    assert generate(stage, given, stop_ids={first[0], second[0]}, max_new_tokens=10) == [[], []]
    assert generate(stage, given, stop_ids=(), max_new_tokens=0) == [[], []]


def test_step_logits_equal_one_pass_over_the_whole_text() -> None:
    stage = model()
    torch.manual_seed(3)
    tokens, modality = prompt(7, 2)
    pixels = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    text = Continuation(stage, batch([(tokens, modality)], pixels), 6)
    steps, chosen = [text.start()], torch.randint(0, 42, (6,))
    steps += [text.extend(token[None]) for token in chosen]
    whole = batch([(tokens + chosen.tolist(), modality + [int(Modality.RESPONSE)] * 6)], pixels)
    with torch.no_grad():
        expected = stage.logits(whole.token_ids, stack_ids(whole), whole.pixels)[0, len(tokens) - 1 :]
    torch.testing.assert_close(torch.cat(steps)[:, :42], expected[:, :42], rtol=1e-10, atol=1e-10)


def test_prompts_that_cannot_be_continued_are_refused() -> None:
    stage = model()
    given = batch([prompt(5, None), prompt(5, None)], torch.zeros(0, 3, 12, 12))
    for row, place, segment in ((1, 3, 1), (1, 0, NO_SEGMENT)):
        segment_ids = given.segment_ids.clone()
        segment_ids[row, place] = segment
        packed = Batch(
            given.token_ids, given.modality_ids, segment_ids, given.position_ids, given.targets, given.pixels
        )
        with pytest.raises(ValueError, match="row 1 is not"):
            generate(stage, packed, stop_ids=(), max_new_tokens=2)
