"""Images and recordings in one prompt: the certificate of the mask and its negative twins, empty batches, seeds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import CONFIG, IMAGE_TOKEN, LATENTS, fine_tuning_batch

from aki_megatron.attention import AttentionMask, LeakError
from aki_megatron.checkpoint.random_init import RandomInitSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import AudioConfig, ModelConfig, ResamplerConfig
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.types import IGNORE, Batch, Modality, stack_ids

TEXT, RESPONSE, IMAGE, AUDIO = (
    int(kind) for kind in (Modality.TEXT, Modality.RESPONSE, Modality.IMAGE, Modality.AUDIO)
)
RULES = ("causal", "mma", "mma_general")
SOUNDS = AudioConfig(
    seconds=1, num_mel_bins=6, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=12,
    resampler=ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=4),
)  # fmt: skip
MODEL = ModelConfig(**(dict(CONFIG) | {"audio": SOUNDS}))
SIZES = {IMAGE: LATENTS, AUDIO: 3}


def batch_of(turns: list[tuple[list[int], int]], seed: int = 0) -> Batch:
    """One sequence of turns, each the kinds of its prompt's pieces and the length of its response."""
    draw = torch.Generator().manual_seed(seed)
    kinds: list[int] = []
    for pieces, answer in turns:
        for piece in pieces:
            kinds += [piece] * SIZES.get(piece, 2)
        kinds += [TEXT] * 2 + [RESPONSE] * answer
    modality = torch.tensor([kinds], dtype=torch.int8)
    drawn = torch.randint(39, (1, len(kinds)), generator=draw)
    tokens = torch.where((modality == IMAGE) | (modality == AUDIO), IMAGE_TOKEN, drawn)
    targets = torch.full_like(tokens, IGNORE)
    targets[:, :-1] = tokens[:, 1:].where(modality[:, 1:] == RESPONSE, IGNORE)
    counts = {kind: kinds.count(kind) // size for kind, size in SIZES.items()}
    return Batch(
        tokens, modality, torch.zeros_like(tokens), torch.arange(len(kinds))[None], targets,
        {Modality.IMAGE: torch.randn(counts[IMAGE], 3, 12, 12, generator=draw),
         Modality.AUDIO: torch.randn(counts[AUDIO], 6, 100, generator=draw)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict[str, Stage]:
    torch.manual_seed(0)
    built = {rule: build_model(MODEL, attention=AttentionConfig(rule=rule)).double() for rule in RULES}
    weights = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in built["causal"].named_parameters()}
    for model in built.values():
        model.load_state_dict(weights, strict=False)
    return built


@torch.no_grad()
def logits(model: Stage, batch: Batch) -> torch.Tensor:
    media = {modality: items.double() for modality, items in batch.media.items()}
    return model.logits(batch.token_ids, stack_ids(batch), media)[0, :, :42]


def with_token(batch: Batch, position: int) -> Batch:
    tokens = batch.token_ids.clone()
    tokens[0, position] = (tokens[0, position] + 1) % 39
    return replace(batch, token_ids=tokens)


def changed_from(model: Stage, before: Batch, after: Batch) -> list[int]:
    """Positions whose logits differ."""
    return ((logits(model, before) - logits(model, after)).abs().amax(-1) > 1e-11).nonzero().flatten().tolist()


prompts = st.lists(
    st.tuples(st.lists(st.sampled_from([TEXT, IMAGE, AUDIO]), max_size=5), st.integers(1, 3)), min_size=1, max_size=3
)


@settings(max_examples=25, deadline=None)
@given(turns=prompts, pick=st.integers(0, 10**6), rule=st.sampled_from(RULES))
def test_an_edited_answer_never_changes_an_earlier_logit(models, turns: list, pick: int, rule: str) -> None:
    batch = batch_of(turns)
    answers = (batch.modality_ids[0] == RESPONSE).nonzero().flatten().tolist()
    position = answers[pick % len(answers)]
    changed = changed_from(models[rule], batch, with_token(batch, position))
    assert min(changed) == position  # nothing before it, and it is seen where it stands


def test_what_sees_what_in_a_prompt_with_both(models) -> None:
    """The negative twin: the same comparison finds the look-aheads that the rules do have, and no others."""
    batch = batch_of([([IMAGE, AUDIO], 2), ([AUDIO], 1)])
    text, second_turn = LATENTS + 3, LATENTS + 3 + 2 + 2
    image, audio = slice(0, LATENTS), slice(LATENTS, text)
    for rule, sees_text, sees_audio in (("causal", 0, 0), ("mma", 1, 0), ("mma_general", 1, 1)):
        mask = models[rule].build_mask(stack_ids(batch)).dense()[0]
        assert mask[image, text : text + 2].all() == sees_text and mask[audio, text : text + 2].all() == sees_text
        assert mask[image, audio].all() == mask[image, audio].any() == sees_audio and mask[audio, image].all()
        assert not mask[:second_turn, second_turn:].any()
    question = with_token(batch, text)
    assert min(changed_from(models["causal"], batch, question)) == text
    assert min(changed_from(models["mma"], batch, question)) == 0  # the image sees the question, and so the rest
    recordings = batch.media[Modality.AUDIO]
    for rule in RULES:  # of the second turn: nothing of the first sees it, everything after does
        louder = torch.stack([recordings[0], 2 * recordings[1]])
        heard = changed_from(models[rule], batch, replace(batch, media={**batch.media, Modality.AUDIO: louder}))
        assert heard == list(range(second_turn, batch.token_ids.shape[1]))


@pytest.mark.parametrize("rule", ["mma", "mma_general"])
def test_supervised_text_after_a_recording_is_refused(rule: str) -> None:
    """The certificate's negative twin: a transcript that is learnt leaks to the recording that sees it."""
    modality = torch.tensor([[AUDIO] * 3 + [TEXT] * 4])
    supervised = torch.zeros(1, 7, dtype=torch.bool)
    supervised[0, 4] = True
    segment = torch.zeros(1, 7, dtype=torch.int32)
    with pytest.raises(LeakError):
        AttentionMask.build(modality, segment, AttentionConfig(rule=rule), supervised=supervised, image_tokens=4)
    for legal in (modality.clone().fill_(TEXT), torch.tensor([[AUDIO] * 3 + [TEXT] + [RESPONSE] * 3])):
        AttentionMask.build(legal, segment, AttentionConfig(rule=rule), supervised=supervised, image_tokens=4)


def test_without_recordings_every_parameter_still_takes_part() -> None:
    """Else ranks that have none would call other collectives than the others, and hang."""
    model = build_model(MODEL, attention=AttentionConfig(rule="mma"))
    batch = fine_tuning_batch()
    loss = model(batch.token_ids, stack_ids(batch), batch.media)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if "audio_resampler" in name:
            assert not parameter.grad.any()
    plain = build_model(CONFIG, attention=AttentionConfig(rule="mma"))
    torch.testing.assert_close(loss, plain(batch.token_ids, stack_ids(batch), batch.media), rtol=0, atol=0)


def test_audio_changes_no_other_weight_and_no_name_of_a_model_without() -> None:
    """Checkpoints and seeds stay those of a model without audio."""
    plain = dict(build_model(CONFIG, attention=AttentionConfig(rule="mma"), seed=5).named_parameters())
    model = dict(build_model(MODEL, attention=AttentionConfig(rule="mma"), seed=5).named_parameters())
    assert all(torch.equal(model[name], weight) for name, weight in plain.items())
    added = model.keys() - plain.keys()
    assert added and all(name.split(".")[1] in ("audio_encoder", "audio_resampler") for name in added)
    assert not any(model[name].requires_grad for name in added if name.split(".")[1] == "audio_encoder")
    source = RandomInitSource(MODEL, 5)
    assert all(torch.equal(source.get(name), model[name]) for name in added)


def test_too_few_recordings_are_named() -> None:
    batch = batch_of([([IMAGE, AUDIO], 2)])
    model = build_model(MODEL, attention=AttentionConfig(rule="mma"))
    with pytest.raises(ValueError, match="3 AUDIO positions but 0 items of 3 latents each"):
        model(batch.token_ids, stack_ids(batch), {Modality.IMAGE: batch.media[Modality.IMAGE]})
