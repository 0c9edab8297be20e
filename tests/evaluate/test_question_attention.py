"""Recomputed probabilities against dense attention; words of a question; one question as the demo page asks for it."""

import numpy as np
import pytest
import torch
from analysis_model import LATENTS, SIDE, ask, eager, model, template, two_turns

from aki_megatron.config.attention import ATTENTION_RULES
from aki_megatron.data.image import OFFICIAL_OPTIONS
from aki_megatron.data.media import media_decoders
from aki_megatron.data.prompt_tokens import PromptToken, locate_prompt
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.evaluate.attention_analysis.capture import AttentionCapture, FullTable, Window
from aki_megatron.evaluate.attention_analysis.question import inspect_question, prefill, prompt_batch
from aki_megatron.evaluate.attention_analysis.words import join_words, split_sentences, split_words, tokens_of_words
from aki_megatron.evaluate.runner import collate_prompts, read_prompt
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, Modality

QUESTION = "Is the red cup left of the spoon?"


def padded_batch(stage: Stage) -> Batch:
    """A prompt of two turns and two images, and a shorter one beside it."""
    decoders = media_decoders(stage.config)
    prompts = [read_prompt(each, template(), decoders) for each in (two_turns(), ask(QUESTION))]
    return collate_prompts(prompts, template(), stage.config.vision.image_size)


@pytest.mark.parametrize("max_elements", [1, 300, 2**24])
@pytest.mark.parametrize("rule", ATTENTION_RULES)
def test_captured_probabilities_are_those_of_dense_attention(rule: str, max_elements: int) -> None:
    stage = model(rule)
    batch = padded_batch(stage)
    is_image = batch.modality_ids == Modality.IMAGE
    every = np.arange(batch.token_ids.shape[1])
    windows = [Window(line.nonzero().flatten().numpy(), every) for line in is_image]
    layers = (0, 2)
    table = FullTable(windows, len(layers), 4)
    with AttentionCapture(stage, windows, layers, table, max_elements=max_elements):
        prefill(stage, batch)
    for number, layer in enumerate(layers):
        expected = eager(stage, batch, layer)
        for sequence, window in enumerate(windows):
            got = table.tables[sequence][number]
            torch.testing.assert_close(got.double(), expected[sequence][:, window.queries], rtol=0, atol=1e-6)
            assert torch.equal(got == 0, expected[sequence][:, window.queries] == 0)
    ahead = torch.cat(
        [table.tables[0][:, :, row, query + 1 :].flatten() for row, query in enumerate(windows[0].queries)]
    )
    assert (ahead.max() > 0.01) == (rule != "causal")


@pytest.mark.parametrize("rule", ["causal", "mma", "cca"])
def test_logits_are_the_same_bits_with_the_capture(rule: str) -> None:
    stage = model(rule)
    batch = padded_batch(stage)
    windows = [Window(np.arange(3, 9), np.arange(9, 20))] * 2
    alone = prefill(stage, batch)
    with AttentionCapture(stage, windows, (0, 1, 2), FullTable(windows, 3, 4)):
        assert torch.equal(prefill(stage, batch), alone)
    assert all(not layer.attention._forward_pre_hooks for layer in stage.layers.values())


def test_half_precision_is_upcast_before_the_softmax() -> None:
    stage = model().bfloat16()
    batch = prompt_batch(stage, template(), ask(QUESTION), OFFICIAL_OPTIONS)
    window = Window(np.arange(batch.token_ids.shape[1]), np.arange(batch.token_ids.shape[1]))
    table = FullTable([window], 1, 4)
    with AttentionCapture(stage, [window], (1,), table):
        prefill(stage, batch)
    torch.testing.assert_close(table.tables[0].sum(-1), torch.ones(1, 4, len(window.queries)), rtol=0, atol=1e-6)
    torch.testing.assert_close(table.tables[0][0].double(), eager(stage, batch, 1)[0], rtol=0, atol=1e-6)


def test_words_are_split_as_the_penn_treebank_has_them() -> None:
    text = "Don't move the cat's 2D-box, it's 3.5 cm; 10:30 a.m.\u2019"
    assert [word.text for word in split_words(text)] == [
        "Do", "n't", "move", "the", "cat", "'s", "2D-box", ",", "it", "'s", "3.5", "cm", ";", "10:30", "a", ".", "m",
        ".", "\u2019",
    ]  # fmt: skip
    assert all(text[word.start : word.end] == word.text for word in split_words(text))
    sentences = split_sentences(split_words("Is it? Yes.\nA. 3.5 cups"), "Is it? Yes.\nA. 3.5 cups")
    assert [[word.text for word in words] for words in sentences] == [
        ["Is", "it", "?"], ["Yes", "."], ["A", "."], ["3.5", "cups"],
    ]  # fmt: skip


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("conversation", [ask(QUESTION), ask("\n Two  \u00e9l\u00e9phants\nB. of \u4e2d"), two_turns()])
def test_tokens_of_the_prompt_are_found_where_they_stand(conversation: object, text_first: bool) -> None:
    shape = template(text_first=text_first)
    layout = locate_prompt(shape, conversation)
    sample = layout.sample
    assert sample == shape.render_prompt(conversation)
    assert [at for run in layout.media for at in range(run.start, run.end)] == [
        at for at, kind in enumerate(sample.modality_ids) if kind == Modality.IMAGE
    ]
    for turn_number, turn in enumerate(conversation.turns):
        covered = set()
        for token in layout.tokens:
            if token.turn == turn_number:
                covered |= set(range(token.start, token.end))
                if shape.tokenizer.is_special(sample.token_ids[token.position]):
                    continue  # a marker that strips the white space after it
                written = shape.tokenizer.token_bytes(sample.token_ids[token.position]).decode(errors="ignore")
                assert written.strip() in turn.prompt[token.start : token.end]
        assert covered == set(range(len(turn.prompt)))


def test_a_token_belongs_to_the_word_it_shares_most_with() -> None:
    text = "left-hand cup"
    tokens = locate_prompt(template(), ask(text)).tokens
    found = tokens_of_words(split_words(text), tokens)
    assert [len(tokens) > 0 for tokens in found] == [True, True]
    assert sorted(sum(found, [])) == [token.position for token in tokens if text[token.start : token.end].strip()]


def test_a_question_is_inspected() -> None:
    stage = model()
    found = inspect_question(stage, template(), ask(QUESTION))
    assert [word.text for word in found.words] == ["Is", "the", "red", "cup", "left", "of", "the", "spoon", "?"]
    assert found.rule == "mma" and found.layers == (0, 1, 2) and all(word.is_later for word in found.words)
    assert found.latent_words.shape == (LATENTS, 9) and found.latent_patches.shape == (LATENTS, SIDE, SIDE)
    assert found.grid.shape == (SIDE, SIDE, 9)
    batch = prompt_batch(stage, template(), ask(QUESTION), OFFICIAL_OPTIONS)
    layout = locate_prompt(template(), ask(QUESTION))
    run = layout.media[0]
    mean = torch.stack([eager(stage, batch, layer)[0] for layer in found.layers]).mean(dim=(0, 1))
    red = [token.position for token in layout.tokens if QUESTION[token.start : token.end].strip() in "red"]
    expected = mean[run.start : run.end, red].sum(dim=1)
    torch.testing.assert_close(found.latent_words[:, 2].double(), expected, rtol=0, atol=1e-6)
    assert found.words[2].mass == pytest.approx(float(expected.mean()), abs=1e-6)
    masses = torch.tensor([word.mass for word in found.words])
    torch.testing.assert_close(found.grid.sum(dim=(0, 1)), masses)
    torch.testing.assert_close(found.latent_patches.sum(dim=(1, 2)), torch.ones(LATENTS))
    last = inspect_question(stage, template(), ask(QUESTION), layers=[-1], resampler_layers="last")
    assert last.layers == (2,) and not torch.allclose(last.latent_patches, found.latent_patches)


def test_nothing_later_is_seen_under_causal_attention() -> None:
    found = inspect_question(model("causal"), template(), ask(QUESTION))
    assert [word.mass for word in found.words] == [0.0] * 9 and not found.grid.any()
    two = inspect_question(model("causal"), template(), two_turns(), image=1)
    assert [word.text for word in two.words] == ["Is", "the", "cup", "left", "of", "this", "?", "And", "that", "?"]
    assert [word.is_later for word in two.words] == [False] * 7 + [False, True, True]
    assert all((word.mass == 0) == word.is_later for word in two.words)


def test_what_cannot_be_inspected_is_named() -> None:
    stage = model()
    with pytest.raises(DataError, match="has 1 images; there is no number 1"):
        inspect_question(stage, template(), ask(QUESTION), image=1)
    with pytest.raises(ConfigError, match="numbered 0 to 2"):
        inspect_question(stage, template(), ask(QUESTION), layers=[3])


def test_words_of_one_token_are_joined() -> None:
    text = "How many red cups are there?"
    ranges = [(0, 8), (8, 12), (12, 15), (15, 28)]
    tokens = [PromptToken(number, 0, start, end) for number, (start, end) in enumerate(ranges)]
    words = join_words(split_words(text), tokens, text)
    assert [word.text for word in words] == ["How many", "red", "cups are there?"]
    assert tokens_of_words(words, tokens) == [[0], [1], [2, 3]]
    assert tokens_of_words(split_words(text), tokens) == [[], [0], [1], [2], [], [3], []]
    assert join_words(split_words(text), locate_prompt(template(), ask(text)).tokens, text) == split_words(text)
