"""Pictures that the page offers to begin with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExampleQuestion:
    """A question about an example, and its answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A picture to begin with.

    image        an encoded file of kind ``media_type``
    description  what a reader who cannot see it is told
    """

    image: bytes
    description: str
    questions: tuple[ExampleQuestion, ...] = ()
    media_type: str = "image/png"
