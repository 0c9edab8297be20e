"""Generation without a cache, batch by batch, equals generation of the whole model with one."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from test_generate import model, prompt
from torch import Tensor

from aki_megatron.data.collate import collate
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.staged_generation import Continuation, GenerationSettings, continue_greedily, fill_sequences
from aki_megatron.types import IGNORE, Batch, DecodedImage, Modality, Sample, image_items, stack_ids

STOPS = set(range(0, 40, 3))
"""Many tokens end an answer, so that answers differ in length."""


def samples() -> list[Sample]:
    torch.manual_seed(1)
    found = []
    for number, (length, image_at) in enumerate([(6, 2), (9, None), (4, 1), (12, 3), (5, None), (7, 2), (3, None)]):
        tokens, modality = prompt(length, image_at)
        pixels = bytes(torch.randint(0, 256, (12 * 12 * 3,)).tolist())
        image = None if image_at is None else DecodedImage(pixels, 12)
        found.append(Sample(str(number), tokens, modality, [IGNORE] * len(tokens), image_items(image)))
    return found


def doubled(batch: Batch) -> dict[Modality, Tensor]:
    return {modality: items.double() for modality, items in batch.media.items()}


def settings(**changes: int) -> GenerationSettings:
    values = {"num_microbatches": 2, "micro_batch_size": 2, "pad_id": 0, "image_size": 12, "max_new_tokens": 6}
    return GenerationSettings(**values | changes, stop_ids=STOPS)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["mma", "causal", "cca"])
@pytest.mark.parametrize("packing", [{}, {"max_positions": 40, "max_images": 2}], ids=["unpacked", "packed"])
def test_answers_are_those_of_the_cached_generation(rule: str, packing: dict[str, int]) -> None:
    stage = model(rule)
    batches_seen: list[Sequence[Batch]] = []

    @torch.no_grad()
    def next_tokens(batches: Sequence[Batch]) -> list[list[int]]:
        batches_seen.append(batches)
        return [stage.next_tokens(b.token_ids, stack_ids(b), doubled(b)).tolist() for b in batches]

    answers = continue_greedily(samples(), next_tokens, settings(**packing), reads_data=True, agree=bool)
    whole = collate([[sample] for sample in samples()], pad_id=0, image_size=12)
    whole = replace(whole, media=doubled(whole))
    assert answers == generate(stage, whole, stop_ids=STOPS, max_new_tokens=6)
    assert len({len(answer) for answer in answers}) > 2, "answers of several lengths"
    assert all(len(batches) == 2 for batches in batches_seen), "every call has all micro-batches, some of them empty"
    if packing:
        assert any(int(batch.segment_ids.max()) > 0 for batches in batches_seen for batch in batches)


def test_a_rank_without_prompts_takes_part_until_all_are_done() -> None:
    pending = [True, True, True, False, False]
    calls: list[int] = []

    def next_tokens(batches: Sequence[Batch]) -> list[list[int]]:
        calls.append(len(batches))
        return [[], []]

    answers = continue_greedily(
        [], next_tokens, settings(), reads_data=False, agree=lambda has_more: has_more or pending.pop(0)
    )
    assert answers == [] and calls == [0, 0], "a round of two tokens of another rank"


@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_generation_ends_when_a_stop_is_agreed_on(calls_before: int) -> None:
    left = [calls_before]

    def agree(has_more: bool) -> bool | None:
        left[0] -= 1
        return has_more if left[0] >= 0 else None

    def next_tokens(batches: Sequence[Batch]) -> list[list[int]]:
        return [[1] * int((batch.targets != IGNORE).sum()) for batch in batches]

    assert continue_greedily(samples(), next_tokens, settings(), reads_data=True, agree=agree) is None


def test_sequences_hold_as_many_prompts_as_fit() -> None:
    prompts = [Continuation(sample) for sample in samples()]
    alone = fill_sequences(prompts, settings())
    assert [len(sequence) for sequence in alone] == [1] * 7
    packed = fill_sequences(prompts, settings(max_positions=40, max_images=2))
    assert [prompt for sequence in packed for prompt in sequence] == prompts
    for sequence in packed:
        assert sum(len(prompt.prompt.token_ids) + 6 for prompt in sequence) <= 40
        assert sum(len(prompt.prompt.media) for prompt in sequence) <= 2
    assert [len(sequence) for sequence in fill_sequences(prompts, settings(max_positions=8, max_images=1))] == [1] * 7
