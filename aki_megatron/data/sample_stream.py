"""The samples of a phase, numbered: sample n is a pure function of (seed, n), whoever asks, in any order, any time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from aki_megatron.data.bad_samples import BadSample, BadSampleBudgetExceeded
from aki_megatron.data.image import PictureCache
from aki_megatron.data.mixture import Draw, Mixture, keyed
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.errors import DataError
from aki_megatron.types import Caption, Conversation, Sample

MOST_ATTEMPTS = 100
"""Elements tried for one sample before its source is given up."""

Element = TypeVar("Element", Conversation, Caption)
ElementRead = TypeVar("ElementRead", Conversation, Caption, covariant=True)


@dataclass(frozen=True)
class Drawn:
    """A numbered sample with its image decoded, None where it is left out, and the bad elements met on the way."""

    sample: Sample | None
    faults: tuple[BadSample, ...]


class SampleStream(Protocol):
    """Numbered samples."""

    def sample(self, n: int, *, replace_images: bool = True) -> Drawn:
        """Sample n: a pure function of (seed, n).

        A bad element is replaced by another of its source. With ``replace_images`` off, one whose image cannot be
        decoded is left out instead, so that what is drawn has the size that ``measure`` told.

        Raises BadSampleBudgetExceeded for a source that has nothing to give.
        """
        ...

    def measure(self, n: int) -> tuple[int, int]:
        """Places and images of sample n, without decoding anything."""
        ...


class Elements(Protocol[ElementRead]):
    """A source: elements by number; reading one may raise DataError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ElementRead: ...


@dataclass(frozen=True)
class Source(Generic[Element]):
    """A source of a mixture.

    order    in which elements are visited; None: each once per pass, every pass in another keyed order
    peek     an element without its picture, where reading that costs; None: reading an element costs little
    augment  whether pictures are cropped and flipped as the released code does (see image.augment)
    """

    elements: Elements[Element]
    order: ShardOrder | None = None
    peek: Callable[[int], Element] | None = None
    augment: bool = False


class MixedStream(Generic[Element]):
    """Mixture, rendering, decoding and the replacement of bad elements, for captions or for conversations.

    A bad element (unreadable image, malformed row, text that is refused, nothing left to learn) is replaced by
    another of the same source, chosen by (seed, n, attempt), so the shares of the sources stay.
    """

    def __init__(
        self,
        sources: Mapping[str, Source[Element]],
        mixture: Mixture,
        render: Callable[[Element], Sample | None],
        *,
        image_size: int,
    ) -> None:
        assert set(mixture.names) == set(sources), (mixture.names, sorted(sources))
        self._sources: list[Source[Element]] = [sources[name] for name in mixture.names]
        self._mixture = mixture
        self._render: Callable[[Element], Sample | None] = render
        self._pictures = PictureCache(image_size)

    def sample(self, n: int, *, replace_images: bool = True) -> Drawn:
        """See SampleStream.sample."""
        draw = self._mixture.draw(n)
        name, source = self._mixture.names[draw.source], self._sources[draw.source]
        faults: list[BadSample] = []
        for element, sample in self._rendered(n, draw, source.elements.__getitem__, faults):
            if element.image is None:
                return Drawn(sample, tuple(faults))
            try:
                augmentation = keyed("augment", self._mixture.seed, n) if source.augment else None
                picture = self._pictures.decode(element.image, key=element.key, augmentation=augmentation)
            except DataError as error:
                faults.append(BadSample(name, str(error)))
                if not replace_images:
                    return Drawn(None, tuple(faults))
            else:
                return Drawn(replace(sample, image=picture), tuple(faults))
        raise _given_up(name, faults)

    def measure(self, n: int) -> tuple[int, int]:
        """See SampleStream.measure."""
        draw = self._mixture.draw(n)
        name, source = self._mixture.names[draw.source], self._sources[draw.source]
        faults: list[BadSample] = []
        for element, sample in self._rendered(n, draw, source.peek or source.elements.__getitem__, faults):
            return len(sample.token_ids), int(element.image is not None)
        raise _given_up(name, faults)

    def _rendered(
        self, n: int, draw: Draw, read: Callable[[int], Element], faults: list[BadSample]
    ) -> Iterator[tuple[Element, Sample]]:
        """Candidates for sample n whose text is good; what was bad before them goes to ``faults``."""
        name = self._mixture.names[draw.source]
        for index in self._candidates(n, draw):
            try:
                element = read(index)
                sample = self._render(element)
                if sample is not None:
                    yield element, sample
                else:
                    reason = f"{element.key}: nothing left to learn (empty, or cut off at the length limit)"
                    faults.append(BadSample(name, reason))
            except DataError as error:
                faults.append(BadSample(name, str(error)))

    def _candidates(self, n: int, draw: Draw) -> Iterator[int]:
        """The element of sample n, then those that stand in for it."""
        source = self._sources[draw.source]
        size, order = len(source.elements), source.order
        yield order.element(draw.visit) if order else self._mixture.element(draw.source, draw.visit, size)
        for attempt in range(1, MOST_ATTEMPTS):
            yield order.substitute(draw.visit, attempt) if order else self._mixture.substitute(n, attempt, size)


def _given_up(name: str, faults: Sequence[BadSample]) -> BadSampleBudgetExceeded:
    listing = "\n  ".join(fault.reason for fault in faults[:5])
    return BadSampleBudgetExceeded(
        f"Source {name} gave no readable sample in {MOST_ATTEMPTS} attempts: data.max_bad_fraction is for a few bad "
        f"ones, here all seem to be. Mend the source, or leave it out. The first:\n  {listing}"
    )
