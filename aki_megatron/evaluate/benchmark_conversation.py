"""A question of a benchmark as a conversation, which the template renders as it renders training data."""

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion
from aki_megatron.evaluate.prompts import ImagePart, PromptProfile
from aki_megatron.types import Conversation, MediaItem, Modality, Placeholder, Turn


def to_conversation(question: BenchmarkQuestion, profile: PromptProfile) -> Conversation:
    """Return the question with its image, read now, and an empty response.

    The key is ``benchmark/id``. Raises DataError where an image is missing or cannot be read.
    """
    text = ""
    placeholders: list[Placeholder] = []
    media: list[MediaItem] = []
    for part in profile.parts(question):
        if isinstance(part, ImagePart):
            if part.number >= len(question.images):
                raise DataError(
                    f"{question.benchmark} question {question.id} shows image {part.number + 1}, but its file has "
                    f"{len(question.images)}; mend the file."
                )
            placeholders.append(Placeholder(len(text), Modality.IMAGE))
            media.append(MediaItem(Modality.IMAGE, question.images[part.number].read()))
        else:
            text += part
    key = f"{question.benchmark}/{question.id}"
    return Conversation(key, (Turn(text, "", tuple(placeholders) if profile.places_image else ()),), tuple(media))
