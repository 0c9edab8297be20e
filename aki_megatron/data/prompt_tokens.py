"""Which tokens of a rendered prompt stand for which characters of the user's own text."""

from dataclasses import dataclass

from aki_megatron.data.template import Template
from aki_megatron.types import MEDIA_MODALITIES, Conversation, Modality, Sample


@dataclass(frozen=True)
class PromptToken:
    """A token that stands for characters of the user's text; tokens of the template alone are none.

    position    in the rendered sample, media expanded
    turn        number of the turn
    start, end  its characters of Turn.prompt; what it holds of the template is cut off
    """

    position: int
    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class MediaRun:
    """The positions of one media item, from ``start`` to before ``end``, and the number of its turn."""

    modality: Modality
    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class PromptLayout:
    """A prompt as Template.render_prompt renders it, and what its positions are."""

    sample: Sample
    tokens: tuple[PromptToken, ...]
    media: tuple[MediaRun, ...]


def locate_prompt(template: Template, conversation: Conversation) -> PromptLayout:
    """Render a prompt and find the user's text and the media in it. Raises DataError as Template.render_prompt does."""
    sample = template.render_prompt(conversation)
    tokens: list[PromptToken] = []
    media: list[MediaRun] = []
    position, turn = 0, 0
    last: int | None = None
    for part in template.conversation_parts(conversation)[:-1]:
        ids, offsets = template.tokenizer.encode_with_offsets(part.text, after=last)
        last = ids[-1] if ids else last
        if part.modality in MEDIA_MODALITIES:
            end = position + template.num_media_tokens[part.modality]
            media.append(MediaRun(part.modality, turn, position, end))
            position = end
            continue
        for number, (start, end) in enumerate(offsets, start=position):
            for span in part.prompt_spans:
                low, high = max(start, span.start), min(end, span.start + span.length)
                if low < high:
                    shift = span.prompt_start - span.start
                    tokens.append(PromptToken(number, span.turn, low + shift, high + shift))
        position += len(ids)
        turn += part.modality == Modality.RESPONSE
    assert position == len(sample.token_ids), sample.key
    return PromptLayout(sample, tuple(tokens), tuple(media))
