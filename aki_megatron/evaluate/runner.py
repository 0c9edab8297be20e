"""Held-out questions of the fine-tuning sources, answered greedily by a trained model."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aki_megatron.data.batch import collate
from aki_megatron.data.image import decode_image
from aki_megatron.data.sources import task_of
from aki_megatron.data.template import Template
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.scores import Answer
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, Conversation


def choose(sources: Mapping[str, Sequence[Conversation]], per_task: int) -> list[Conversation]:
    """At most ``per_task`` questions of each task, spread evenly over its source (0: all of them)."""
    by_task: dict[str, list[Conversation]] = defaultdict(list)
    for source in sources.values():
        for index in range(len(source)):
            by_task[task_of(source[index].key)].append(source[index])
    chosen: list[Conversation] = []
    for group in by_task.values():
        count = min(per_task or len(group), len(group))
        chosen += [group[position * len(group) // count] for position in range(count)]
    return chosen


def prompt_batch(conversations: Sequence[Conversation], template: Template, image_size: int) -> Batch:
    """The prompts of some questions, with their pictures, right padded."""
    samples = []
    for conversation in conversations:
        sample = template.render_prompt(conversation)
        if conversation.image is not None:
            sample = replace(sample, image=decode_image(conversation.image, image_size, key=sample.key))
        samples.append(sample)
    return collate([[sample] for sample in samples], pad_id=template.tokenizer.pad, image_size=image_size)


def answer_all(
    model: Stage,
    template: Template,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 100,
    max_new_tokens: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Answer]:
    """Answer every question; ``progress`` is called with the number of questions answered so far."""
    tokenizer = template.tokenizer
    for first in range(0, len(conversations), batch_size):
        group = conversations[first : first + batch_size]
        batch = prompt_batch(group, template, model.config.vision.image_size)
        replies = generate(model, batch, stop_ids=tokenizer.stops, max_new_tokens=max_new_tokens)
        for conversation, ids in zip(group, replies, strict=True):
            turn = conversation.turns[-1]
            yield Answer(
                key=conversation.key,
                task=task_of(conversation.key),
                question=turn.prompt,
                gold=turn.response,
                given=tokenizer.decode(ids).strip(),
                image=str(conversation.image) if isinstance(conversation.image, Path) else None,
            )
        progress(first + len(group))
