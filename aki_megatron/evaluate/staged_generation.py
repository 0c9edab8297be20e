"""Greedy generation through the stages of a training engine, under any parallel layout.

Each new token costs a forward pass over the sequences so far: the stages keep no keys and values, and weights stay
where training needs them. Answers are short, and those that have ended leave the batches. The tokens are those of
generate.py, which has the whole model on one device and a cache.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

from aki_megatron.data.collate import collate
from aki_megatron.types import IGNORE, Batch, Modality, Sample

NextTokens = Callable[[Sequence[Batch]], list[list[int]]]
"""Micro-batches -> the most likely next token at each position with a target (Engine.next_tokens); collective."""

WANTED = 0
"""Target of a position whose next token is wanted; its value does not matter."""


@dataclass
class Continuation:
    """A prompt and the tokens generated after it, without the one that ended them."""

    prompt: Sample
    tokens: list[int] = field(default_factory=list)
    is_finished: bool = False

    def sample(self) -> Sample:
        """Return the sequence so far, whose next token is wanted."""
        prompt, num_new = self.prompt, len(self.tokens)
        num_positions = len(prompt.token_ids) + num_new
        return replace(
            prompt,
            token_ids=[*prompt.token_ids, *self.tokens],
            modality_ids=[*prompt.modality_ids, *[int(Modality.RESPONSE)] * num_new],
            targets=[IGNORE] * (num_positions - 1) + [WANTED],
        )


@dataclass(frozen=True)
class GenerationSettings:
    """How prompts are batched and continued.

    num_microbatches, micro_batch_size  micro-batches per call of NextTokens, and sequences in each
    pad_id, image_size                  as of collate
    stop_ids, max_new_tokens            an answer ends before the first of these tokens, or at this many
    max_positions, max_images           of a sequence of several prompts; 0: each prompt has a sequence of its own
    """

    num_microbatches: int
    micro_batch_size: int
    pad_id: int
    image_size: int
    stop_ids: Collection[int]
    max_new_tokens: int
    max_positions: int = 0
    max_images: int = 0


Sequences = list[list[Continuation]]


def fill_sequences(prompts: Sequence[Continuation], settings: GenerationSettings) -> Sequences:
    """Put prompts into sequences in their order; one that is too long for any has a sequence of its own."""
    sequences: Sequences = []
    free_positions = free_images = 0
    for prompt in prompts:
        length = len(prompt.prompt.token_ids) + settings.max_new_tokens
        images = len(prompt.prompt.media)
        if not sequences or length > free_positions or images > free_images:
            sequences.append([])
            free_positions, free_images = settings.max_positions, settings.max_images
        sequences[-1].append(prompt)
        free_positions -= length
        free_images -= images
    return sequences


def continue_greedily(
    prompts: Sequence[Sample],
    next_tokens: NextTokens,
    settings: GenerationSettings,
    *,
    reads_data: bool,
    agree: Callable[[bool], bool | None],
) -> list[list[int]] | None:
    """Continue the prompts of this data rank greedily; collective: every rank calls it, also one without prompts.

    reads_data  whether this rank passes batches to ``next_tokens``
    agree       takes whether this rank has work left; returns whether any rank has, None when generation is to end

    Returns the new tokens of each prompt without the stop id; None when ``agree`` did.
    """
    continuations = [Continuation(prompt) for prompt in prompts]
    sequences = fill_sequences(continuations, settings)
    per_call = settings.num_microbatches * settings.micro_batch_size
    first = 0
    while True:
        has_more = agree(first < len(sequences))
        if has_more is None:
            return None
        if not has_more:
            return [continuation.tokens for continuation in continuations]
        if not _continue(sequences[first : first + per_call], next_tokens, settings, reads_data, agree):
            return None
        first += per_call


def _continue(
    sequences: Sequences,
    next_tokens: NextTokens,
    settings: GenerationSettings,
    reads_data: bool,
    agree: Callable[[bool], bool | None],
) -> bool:
    """Continue the prompts of one call's sequences to their ends; return False when generation is to end."""
    size = settings.micro_batch_size
    microbatches = [sequences[number * size : (number + 1) * size] for number in range(settings.num_microbatches)]
    while True:
        unfinished = [
            [[each for each in sequence if not each.is_finished] for sequence in microbatch]
            for microbatch in microbatches
        ]
        goes_on = agree(any(sequence for microbatch in unfinished for sequence in microbatch))
        if not goes_on:
            return goes_on is not None
        batches = [_collate(microbatch, settings) for microbatch in unfinished] if reads_data else []
        tokens = next_tokens(batches)
        if reads_data:
            for microbatch, found in zip(unfinished, tokens, strict=True):
                _append([each for sequence in microbatch for each in sequence], found, settings)


def _collate(microbatch: Sequences, settings: GenerationSettings) -> Batch:
    """Collate the sequences that are not finished; a micro-batch without any has one of padding."""
    samples = [[each.sample() for each in sequence] for sequence in microbatch if sequence]
    return collate(samples or [[]], pad_id=settings.pad_id, image_size=settings.image_size)


def _append(continuations: Sequence[Continuation], tokens: Sequence[int], settings: GenerationSettings) -> None:
    for continuation, token in zip(continuations, tokens, strict=True):
        if token in settings.stop_ids:
            continuation.is_finished = True
            continue
        continuation.tokens.append(token)
        continuation.is_finished = len(continuation.tokens) == settings.max_new_tokens
