"""The samples of a run, numbered: sample n is a pure function of (seed, n), whoever asks, in any order, at any time."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from aki_megatron.data.image import PictureCache
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.shards import ShardIndex
from aki_megatron.data.template import Template
from aki_megatron.flow import Caption, Conversation, DataError, Sample

TOLERATED = 8
"""Bad samples that never stop a run whose budget is not 0: a share means nothing over the first few hundred."""

MOST_ATTEMPTS = 100
"""Elements tried for one sample before its source is given up."""

_NAMED = 5

Element = TypeVar("Element", Conversation, Caption)
ElementRead = TypeVar("ElementRead", Conversation, Caption, covariant=True)


class TooManyLost(DataError):  # noqa: N818 (the name the rules of the house use)
    """More samples were unreadable or empty than the budget allows; the message names the first ones."""


class SampleStream(Protocol):
    """Numbered samples with decoded images."""

    losses: "Losses"

    def sample(self, n: int) -> Sample:
        """Sample n of the run: a pure function of (seed, n)."""
        ...


class Elements(Protocol[ElementRead]):
    """A source: elements by number; reading one may raise DataError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ElementRead: ...


@dataclass
class Losses:
    """Bad elements met by this process since it started, counted by source.

    The run stops (TooManyLost) as soon as more than max(8, max_bad_fraction x samples asked for) were bad; with
    max_bad_fraction = 0 at the first. An element that is met again counts again: the budget is a share of
    what is trained on. Every rank counts what it reads itself.
    """

    max_bad_fraction: float
    asked: int = 0
    by_source: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    latest: str = ""

    def describe(self) -> str:
        """How many bad elements were met, by source, and the latest; empty while there is none."""
        if not self.latest:
            return ""
        counts = ", ".join(f"{name} {count}" for name, count in sorted(self.by_source.items()))
        return f"{self.by_source.total()} bad elements in {self.asked} samples ({counts}); the latest: {self.latest}"

    def record(self, source: str, reason: str) -> None:
        """Count one bad element; TooManyLost when the budget is spent."""
        self.by_source[source] += 1
        self.latest = reason
        if len(self.first) < _NAMED:
            self.first.append(reason)
        bad = self.by_source.total()
        allowed = max(TOLERATED, self.max_bad_fraction * self.asked) if self.max_bad_fraction else 0
        if bad > allowed:
            shares = ", ".join(f"{name} {count}" for name, count in sorted(self.by_source.items()))
            listing = "\n  ".join(self.first)
            raise TooManyLost(
                f"{bad} bad elements in {self.asked} samples ({shares}), more than data.max_bad_fraction="
                f"{self.max_bad_fraction} allows. Mend or remove them, or raise it. The first:\n  {listing}"
            )


class _Stream(Generic[Element]):
    """Mixture, rendering, decoding and the replacement of bad elements, for either kind of element.

    A bad element (unreadable image, malformed row, text that is refused, nothing left to learn) is replaced by
    another of the same source, chosen by (seed, n, attempt), so the shares of the sources stay.
    """

    def __init__(
        self,
        sources: Mapping[str, Elements[Element]],
        render: Callable[[Element], Sample | None],
        mixture: Mixture,
        *,
        image_size: int,
        max_bad_fraction: float,
    ) -> None:
        self.losses = Losses(max_bad_fraction)
        self._sources: list[Elements[Element]] = [sources[name] for name in mixture.names]
        self._render: Callable[[Element], Sample | None] = render
        self._mixture = mixture
        self._pictures = PictureCache(image_size)

    def sample(self, n: int) -> Sample:
        """Sample n of the run, its image decoded. Raises TooManyLost."""
        self.losses.asked += 1
        draw = self._mixture.draw(n)
        source, name = self._sources[draw.source], self._mixture.names[draw.source]
        index = self._mixture.element(draw.source, draw.visit, len(source))
        for attempt in range(1, MOST_ATTEMPTS + 1):
            try:
                sample = self._prepare(source[index])
            except DataError as error:
                self.losses.record(name, str(error))
            else:
                if sample is not None:
                    return sample
                self.losses.record(
                    name, f"{source[index].key}: nothing left to learn (empty, or cut off at the length limit)"
                )
            index = self._mixture.substitute(n, attempt, len(source))
        listing = "\n  ".join(self.losses.first)
        raise TooManyLost(f"Source {name} gave no readable sample in {MOST_ATTEMPTS} attempts. The first:\n  {listing}")

    def _prepare(self, element: Element) -> Sample | None:
        sample = self._render(element)
        if sample is None or element.image is None:
            return sample
        return replace(sample, image=self._pictures.decode(element.image, key=element.key))


class CaptionStream(_Stream[Caption]):
    """Pretraining: captions of one set of tars, everything once per pass in a keyed order."""

    def __init__(
        self, index: ShardIndex, template: Template, *, seed: int, image_size: int, max_bad_fraction: float
    ) -> None:
        super().__init__(
            {"captions": index},
            template.render_caption,
            Mixture({"captions": 1.0}, seed=seed),
            image_size=image_size,
            max_bad_fraction=max_bad_fraction,
        )


class ConversationStream(_Stream[Conversation]):
    """Fine-tuning: sources mixed by weight (papers, Table 4)."""

    def __init__(
        self,
        sources: Mapping[str, Sequence[Conversation]],
        weights: Mapping[str, float],
        template: Template,
        *,
        seed: int,
        image_size: int,
        max_bad_fraction: float,
    ) -> None:
        assert set(weights) == set(sources), (sorted(weights), sorted(sources))
        super().__init__(
            sources,
            template.render_conversation,
            Mixture(weights, seed=seed),
            image_size=image_size,
            max_bad_fraction=max_bad_fraction,
        )
