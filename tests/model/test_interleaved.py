"""Several images, turns and segments: what may change what, on the whole model."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CONFIG, IMAGE_TOKEN, LATENTS

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.data.collate import collate
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, Batch, DecodedImage, MediaItem, Modality, Sample, stack_ids

RULES = ("causal", "mma", "mma_general", "mixed", "cca")
TEXT, RESPONSE, IMAGE = int(Modality.TEXT), int(Modality.RESPONSE), int(Modality.IMAGE)
SIZE = CONFIG.vision.image_size

turns = st.lists(
    st.tuples(st.lists(st.sampled_from(["text", "image"]), max_size=4), st.integers(1, 3)), min_size=1, max_size=3
)


def sample_of(structure: list[tuple[list[str], int]], seed: int) -> Sample:
    """A sample of turns, each the pieces of a prompt and the length of a response, with random tokens and images."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    kinds: list[int] = []
    media: list[MediaItem] = []
    for pieces, answer in structure:
        for piece in pieces:
            tokens += (
                [IMAGE_TOKEN] * LATENTS if piece == "image" else torch.randint(39, (2,), generator=generator).tolist()
            )
            kinds += [IMAGE] * LATENTS if piece == "image" else [TEXT] * 2
            if piece == "image":
                rgb = torch.randint(256, (SIZE * SIZE * 3,), generator=generator).to(torch.uint8)
                media.append(MediaItem(Modality.IMAGE, DecodedImage(rgb.numpy().tobytes(), SIZE)))
        tokens += torch.randint(39, (2 + answer,), generator=generator).tolist()
        kinds += [TEXT] * 2 + [RESPONSE] * answer
    targets = [token if kind == RESPONSE else IGNORE for token, kind in zip(tokens[1:], kinds[1:], strict=True)]
    return Sample(f"s/{seed}", tokens, kinds, [*targets, IGNORE], tuple(media))


@pytest.fixture(scope="module")
def models() -> dict[str, Stage]:
    torch.manual_seed(0)
    built = {rule: build_model(CONFIG, attention=AttentionConfig(rule=rule)).double() for rule in RULES}
    weights = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in built["causal"].named_parameters()}
    for model in built.values():
        model.load_state_dict(weights, strict=False)
    return built


def logits(model: Stage, batch: Batch) -> torch.Tensor:
    media = {modality: items.double() for modality, items in batch.media.items()}
    with torch.no_grad():
        return model.logits(batch.token_ids, stack_ids(batch), media)[..., :42]


def edited(batch: Batch, position: int) -> Batch:
    tokens = batch.token_ids.clone()
    tokens[0, position] = (tokens[0, position] + 1) % 39
    return replace(batch, token_ids=tokens)


@settings(max_examples=25, deadline=None)
@given(packed=st.lists(turns, min_size=1, max_size=2), pick=st.integers(0, 10**6), rule=st.sampled_from(RULES))
def test_an_edited_answer_never_changes_an_earlier_logit(models, packed: list, pick: int, rule: str) -> None:
    samples = [sample_of(structure, number) for number, structure in enumerate(packed)]
    batch = collate([samples], pad_id=39, image_size=SIZE)
    answers = (batch.modality_ids[0] == RESPONSE).nonzero().flatten().tolist()
    position = answers[pick % len(answers)]
    before, after = logits(models[rule], batch), logits(models[rule], edited(batch, position))
    torch.testing.assert_close(before[0, :position], after[0, :position], rtol=1e-12, atol=1e-12)
    other = batch.segment_ids[0] != batch.segment_ids[0, position]
    torch.testing.assert_close(before[0, other], after[0, other], rtol=1e-12, atol=1e-12)
    assert (before[0, position] - after[0, position]).abs().max() > 1e-6  # the edit is seen where it stands


@pytest.mark.parametrize("rule", ["mma", "mma_general"])
def test_an_edited_question_changes_the_images_before_it_in_its_turn_only(models, rule: str) -> None:
    """The negative twin: the comparison above finds a look-ahead where there is one."""
    sample = sample_of([(["text", "image", "text", "image"], 2), (["image"], 1), (["text"], 1)], 7)
    batch = collate([[sample]], pad_id=39, image_size=SIZE)
    kinds = batch.modality_ids[0]
    answer = int((kinds == RESPONSE).nonzero()[0])
    second_image = int((kinds[answer:] == IMAGE).nonzero()[0]) + answer
    first_image = 0 if rule == "mma_general" else 2  # there the text before it sees the image
    for position, first_changed in ((answer - 1, first_image), (second_image + LATENTS, second_image)):
        difference = (logits(models[rule], batch) - logits(models[rule], edited(batch, position)))[0].abs().amax(-1)
        assert difference[first_changed] > 1e-9 and not (difference[:first_changed] > 1e-12).any()
        assert difference[first_changed : first_changed + LATENTS].min() > 1e-9


def test_packed_interleaved_samples_equal_each_alone(models) -> None:
    structures = [
        [(["image", "image", "text"], 2), ([], 1)],
        [(["text"], 3)],
        [(["text", "image", "text", "image"], 1), (["image", "image"], 2)],
    ]
    samples = [sample_of(structure, number) for number, structure in enumerate(structures)]
    for rule in RULES:
        packed = logits(models[rule], collate([samples], pad_id=39, image_size=SIZE))[0]
        start = 0
        for sample in samples:
            alone = logits(models[rule], collate([[sample]], pad_id=39, image_size=SIZE))[0]
            torch.testing.assert_close(packed[start : start + len(alone)], alone, rtol=1e-10, atol=1e-10)
            start += len(alone)
