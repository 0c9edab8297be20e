"""Measure questions: attention of their image tokens to each category of words."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from aki_megatron.data.media import media_decoders
from aki_megatron.data.prompt_tokens import PromptLayout, locate_prompt
from aki_megatron.errors import DataError
from aki_megatron.evaluate.attention_analysis.capture import AttentionCapture, HeadTable, Window
from aki_megatron.evaluate.attention_analysis.categories import INSTRUCTION, Categories
from aki_megatron.evaluate.attention_analysis.question import prefill
from aki_megatron.evaluate.attention_analysis.statistics import AttentionStatistics, SampleAttention
from aki_megatron.evaluate.attention_analysis.taggers import Tagger
from aki_megatron.evaluate.attention_analysis.words import Word, split_sentences, split_words, tokens_of_words
from aki_megatron.evaluate.model_loading import LoadedModel
from aki_megatron.evaluate.runner import collate_prompts, read_prompt
from aki_megatron.types import Conversation, Modality, Sample


@dataclass(frozen=True)
class Question:
    """What is measured of one prompt.

    queries   positions of images that a later word of their turn belongs to
    keys      positions of the words' tokens after an image of their turn
    counted   bool [queries, keys]: the key comes later than the query, in the same turn
    category  of each key, as its number among the categories; that of constant instructions is the last
    """

    prompt: Sample
    queries: np.ndarray
    keys: np.ndarray
    counted: np.ndarray
    category: np.ndarray
    num_words: np.ndarray


def read_question(model: LoadedModel, conversation: Conversation, tagger: Tagger, categories: Categories) -> Question:
    """Render a prompt, decode its media, and tag its words.

    Raises DataError where it cannot be read, is too long for the model, or has no word after an image of its turn.
    """
    layout = locate_prompt(model.template, conversation)
    limit, needed = model.stage.config.decoder.rope.max_position_embeddings, len(layout.sample.token_ids)
    if needed > limit:
        raise DataError(f"Question {conversation.key} takes {needed} positions, more than the {limit} of the model.")
    images = [run for run in layout.media if run.modality == Modality.IMAGE]
    number_of = {name: number for number, name in enumerate((*categories.names, INSTRUCTION))}
    keys: list[int] = []
    turns: list[int] = []
    category: list[int] = []
    num_words = np.zeros(len(number_of), dtype=np.int64)
    for turn in {run.turn: None for run in images}:
        first = min(run.end for run in images if run.turn == turn)
        for name, positions in _named_words(layout, conversation, turn, tagger, categories):
            later = [position for position in positions if position >= first]
            num_words[number_of[name]] += bool(later)
            keys += later
            turns += [turn] * len(later)
            category += [number_of[name]] * len(later)
    queries = np.array([position for run in images for position in range(run.start, run.end)], dtype=np.int64)
    query_turns = np.array([run.turn for run in images for _ in range(run.start, run.end)], dtype=np.int64)
    counted = (queries[:, None] < np.array(keys)[None, :]) & (query_turns[:, None] == np.array(turns)[None, :])
    used = counted.any(axis=1) if keys else np.zeros(len(queries), dtype=bool)
    if not used.any():
        raise DataError(f"Question {conversation.key} has no word after an image; there is nothing to look ahead for.")
    prompt = read_prompt(conversation, model.template, media_decoders(model.stage.config, model.image_options))
    return Question(prompt, queries[used], np.array(keys), counted[used], np.array(category), num_words)


def _named_words(
    layout: PromptLayout, conversation: Conversation, turn: int, tagger: Tagger, categories: Categories
) -> Iterator[tuple[str, list[int]]]:
    """Yield the category of each word of a turn, and the positions of its tokens."""
    text = conversation.turns[turn].prompt
    words = split_words(text)
    tags: dict[Word, str] = {}
    for sentence in split_sentences(words, text):
        tags |= zip(sentence, tagger.tag([word.text for word in sentence]), strict=True)
    tokens = tokens_of_words(words, (token for token in layout.tokens if token.turn == turn))
    constant = categories.instruction_words(words, text)
    for word, positions, is_constant in zip(words, tokens, constant, strict=True):
        yield (INSTRUCTION if is_constant else categories.find(word.text, tags[word])), positions


def measure_batch(model: LoadedModel, questions: Sequence[Question], layers: Sequence[int]) -> list[SampleAttention]:
    """Run the prompts in one pass of the model; return what was measured, in their order."""
    windows = [Window(question.queries, question.keys) for question in questions]
    counted = [torch.from_numpy(question.counted) for question in questions]
    table = HeadTable(counted, len(layers), model.stage.config.decoder.num_heads)
    image_size = model.stage.config.vision.image_size
    batch = collate_prompts([question.prompt for question in questions], model.template, image_size)
    with AttentionCapture(model.stage, windows, layers, table):
        prefill(model.stage, batch)
    found = []
    for question, by_key in zip(questions, table.tables, strict=True):
        category, count = torch.from_numpy(question.category), len(question.num_words)
        mass = torch.zeros(*by_key.shape[:2], count).index_add_(2, category, by_key)
        num_tokens = torch.bincount(category, minlength=count)
        found.append(SampleAttention(question.prompt.key, mass, num_tokens, torch.from_numpy(question.num_words)))
    return found


def measure(
    model: LoadedModel,
    name: str,
    conversations: Sequence[Callable[[], Conversation]],
    layers: tuple[int, ...],
    tagger: Tagger,
    categories: Categories,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> AttentionStatistics:
    """Measure the questions of one benchmark; what cannot be used is counted with its reason.

    conversations  functions that return a question with its image, called when it is its turn
    progress       is called with the number of questions done
    """
    heads = model.stage.config.decoder.num_heads
    statistics = AttentionStatistics(name, categories.names, layers, heads)
    for first in range(0, len(conversations), batch_size):
        group: list[Question] = []
        for read in conversations[first : first + batch_size]:
            try:
                group.append(read_question(model, read(), tagger, categories))
            except DataError as error:
                statistics.add_error(str(error))
        for sample in measure_batch(model, group, layers) if group else []:
            statistics.add(sample)
        progress(min(first + batch_size, len(conversations)))
    return statistics
