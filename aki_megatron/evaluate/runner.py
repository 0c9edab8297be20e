"""Select val questions of the fine-tuning sources and answer them greedily with a trained model."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aki_megatron.data.collate import collate
from aki_megatron.data.image import OFFICIAL_OPTIONS, ImageOptions, decode_image
from aki_megatron.data.sources import task_of
from aki_megatron.data.template import Template
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.scores import Prediction
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, Conversation


def select_questions(sources: Mapping[str, Sequence[Conversation]], max_per_task: int) -> list[Conversation]:
    """Return at most ``max_per_task`` questions of each task, evenly spaced over its source (0: all of them)."""
    by_task: dict[str, list[Conversation]] = defaultdict(list)
    for source in sources.values():
        for index in range(len(source)):
            by_task[task_of(source[index].key)].append(source[index])
    selected: list[Conversation] = []
    for group in by_task.values():
        count = min(max_per_task or len(group), len(group))
        selected += [group[number * len(group) // count] for number in range(count)]
    return selected


def collate_prompts(
    conversations: Sequence[Conversation],
    template: Template,
    image_size: int,
    image_options: ImageOptions = OFFICIAL_OPTIONS,
) -> Batch:
    """Render the prompts of ``conversations``, decode their images and pad them on the right."""
    samples = []
    for conversation in conversations:
        sample = template.render_prompt(conversation)
        if conversation.image is not None:
            image = decode_image(conversation.image, image_size, key=sample.key, options=image_options)
            sample = replace(sample, image=image)
        samples.append(sample)
    return collate([[sample] for sample in samples], pad_id=template.tokenizer.pad_id, image_size=image_size)


def predict(
    model: Stage,
    template: Template,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 100,
    max_new_tokens: int = 16,
    image_options: ImageOptions = OFFICIAL_OPTIONS,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Prediction]:
    """Answer every question; ``progress`` is called with the number of questions answered so far."""
    tokenizer = template.tokenizer
    for first in range(0, len(conversations), batch_size):
        group = conversations[first : first + batch_size]
        batch = collate_prompts(group, template, model.config.vision.image_size, image_options)
        generated = generate(model, batch, stop_ids=tokenizer.stop_ids, max_new_tokens=max_new_tokens)
        for conversation, ids in zip(group, generated, strict=True):
            turn = conversation.turns[-1]
            yield Prediction(
                key=conversation.key,
                task=task_of(conversation.key),
                question=turn.prompt,
                reference_answer=turn.response,
                generated_answer=tokenizer.decode(ids).strip(),
                image=str(conversation.image) if isinstance(conversation.image, Path) else None,
            )
        progress(first + len(group))
