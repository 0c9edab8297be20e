"""Select val questions of the fine-tuning sources and answer them greedily with a trained model."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aki_megatron.data.bad_samples import BadSample, BadSampleBudget, sample_errors
from aki_megatron.data.collate import collate
from aki_megatron.data.image import OFFICIAL_OPTIONS, ImageOptions
from aki_megatron.data.media import Decoders, decode_item, media_decoders
from aki_megatron.data.sources import task_of
from aki_megatron.data.template import Template
from aki_megatron.errors import DataError
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.scores import Prediction
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, Conversation, Sample


def select_questions(
    sources: Mapping[str, Sequence[Conversation]], max_per_task: int, bad_samples: BadSampleBudget
) -> list[Conversation]:
    """Return at most ``max_per_task`` questions of each task, evenly spaced over its source (0: all of them).

    Every question is counted in ``bad_samples``, which raises BadSampleBudgetExceeded when too many cannot be read.
    """
    by_task: dict[str, list[Conversation]] = defaultdict(list)
    unreadable: list[BadSample] = []
    for name, source in sources.items():
        for index in range(len(source)):
            try:
                with sample_errors(f"question {index} of source {name}"):
                    question = source[index]
                    question.key.encode()  # half a surrogate pair cannot be written to the predictions
            except DataError as error:
                unreadable.append(BadSample(name, str(error)))
            else:
                by_task[task_of(question.key)].append(question)
    bad_samples.record(sum(map(len, by_task.values())), unreadable)
    selected: list[Conversation] = []
    for group in by_task.values():
        count = min(max_per_task or len(group), len(group))
        selected += [group[number * len(group) // count] for number in range(count)]
    return selected


def read_prompt(conversation: Conversation, template: Template, decoders: Decoders) -> Sample:
    """Render the prompt of a conversation and decode its media. Raises DataError where either cannot be done."""
    with sample_errors(f"question {conversation.key}"):
        sample = template.render_prompt(conversation)
    media = tuple(
        decode_item(item, decoders, sample.key) if isinstance(item.content, Path | bytes) else item
        for item in sample.media
    )
    return replace(sample, media=media)


def collate_prompts(prompts: Sequence[Sample], template: Template, image_size: int) -> Batch:
    """Pad the prompts of ``read_prompt`` on the right."""
    return collate([[prompt] for prompt in prompts], pad_id=template.tokenizer.pad_id, image_size=image_size)


def predict(
    model: Stage,
    template: Template,
    conversations: Sequence[Conversation],
    *,
    bad_samples: BadSampleBudget,
    batch_size: int = 100,
    max_new_tokens: int = 16,
    image_options: ImageOptions = OFFICIAL_OPTIONS,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Prediction]:
    """Answer every question that can be read; ``progress`` is called with the number of questions done so far.

    Those that cannot are moved from the good to the bad ones of ``bad_samples``, which raises BadSampleBudgetExceeded
    when there are too many.
    """
    tokenizer, image_size = template.tokenizer, model.config.vision.image_size
    decoders = media_decoders(model.config, image_options)
    for first in range(0, len(conversations), batch_size):
        group = conversations[first : first + batch_size]
        good: list[Conversation] = []
        prompts: list[Sample] = []
        unreadable: list[BadSample] = []
        for conversation in group:
            try:
                prompts.append(read_prompt(conversation, template, decoders))
                good.append(conversation)
            except DataError as error:
                unreadable.append(BadSample(task_of(conversation.key), str(error)))
        bad_samples.record(-len(unreadable), unreadable)
        generated: list[list[int]] = []
        if prompts:
            batch = collate_prompts(prompts, template, image_size)
            generated = generate(model, batch, stop_ids=tokenizer.stop_ids, max_new_tokens=max_new_tokens)
        for conversation, ids in zip(good, generated, strict=True):
            turn = conversation.turns[-1]
            yield Prediction(
                key=conversation.key,
                task=task_of(conversation.key),
                question=turn.prompt,
                reference_answer=turn.response,
                generated_answer=tokenizer.decode(ids).strip(),
                images=[str(image) for image in conversation.images if isinstance(image, Path)],
            )
        progress(first + len(group))
