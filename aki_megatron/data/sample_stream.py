"""The numbered samples of a phase: sample n is a pure function of (seed, n), for any caller, in any order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.bad_samples import BadSample, BadSampleBudgetExceeded, sample_errors
from aki_megatron.data.image import OFFICIAL_OPTIONS, ImageCache, ImageOptions
from aki_megatron.data.mixture import Mixture, SourceDraw
from aki_megatron.data.permutation import derive_seed
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.errors import DataError
from aki_megatron.types import Caption, Conversation, DecodedImage, MediaItem, Sample

MAX_ATTEMPTS = 100
"""Items tried for one sample before its source is given up."""

Item = TypeVar("Item", Conversation, Caption)
ItemRead = TypeVar("ItemRead", Conversation, Caption, covariant=True)


@dataclass(frozen=True)
class LoadedSample:
    """A numbered sample with its image decoded, None where it is left out, and the bad samples met on the way."""

    sample: Sample | None
    bad_samples: tuple[BadSample, ...]


class SampleStream(Protocol):
    """Numbered samples."""

    def sample(self, n: int, *, replace_images: bool = True) -> LoadedSample:
        """Return sample n, a pure function of (seed, n).

        A bad item is replaced by another of its source. Without ``replace_images``, one whose image cannot be decoded
        is left out instead, so that the sample has the size that ``length`` returned.

        Raises BadSampleBudgetExceeded for a source without a readable item.
        """
        ...

    def length(self, n: int) -> tuple[int, int]:
        """Return the number of positions and of media items of sample n, without decoding anything."""
        ...


class ItemSequence(Protocol[ItemRead]):
    """The items of a source by index; reading one may raise DataError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ItemRead: ...


@dataclass(frozen=True)
class Source(Generic[Item]):
    """A source of a mixture.

    order      in which items are drawn; None: each once per epoch, every epoch in another seeded order
    read_text  an item without its image, where reading that costs; None: reading an item costs little
    locate     how messages name an item: file and key; None: by its key
    augment    whether images are cropped and flipped as in the released code (see image.augment)
    counts     items of each part that should be read together, as a tar; None: items are read one by one
    """

    items: ItemSequence[Item]
    order: ShardOrder | None = None
    read_text: Callable[[int], Item] | None = None
    locate: Callable[[int], str] | None = None
    augment: bool = False
    counts: NDArray[np.int64] | None = None


class MixtureStream(Generic[Item]):
    """Draw from a mixture, render, decode, and replace bad items, for captions or for conversations.

    A bad item (unreadable image, malformed record, text that is refused, no supervised token, or whatever else a
    decoder or the tokenizer raises at it) is replaced by another of the same source, chosen by (seed, n, attempt), so
    the proportions of the sources stay.
    """

    def __init__(
        self,
        sources: Mapping[str, Source[Item]],
        mixture: Mixture,
        render: Callable[[Item], Sample | None],
        *,
        image_size: int,
        image_options: ImageOptions = OFFICIAL_OPTIONS,
        prepare: Callable[[Item, int], Item] | None = None,
    ) -> None:
        """Draw from ``mixture``; ``prepare`` returns an item as sample number n takes it, None: as it is."""
        assert set(mixture.names) == set(sources), (mixture.names, sorted(sources))
        self._sources: list[Source[Item]] = [sources[name] for name in mixture.names]
        self._mixture = mixture
        self._render: Callable[[Item], Sample | None] = render
        self._prepare: Callable[[Item, int], Item] | None = prepare
        self._images = ImageCache(image_size, image_options)

    def sample(self, n: int, *, replace_images: bool = True) -> LoadedSample:
        draw = self._mixture.draw(n)
        name, source = self._mixture.names[draw.source], self._sources[draw.source]
        bad_samples: list[BadSample] = []
        for item, sample in self._rendered(n, draw, source.items.__getitem__, bad_samples):
            augment_seed = derive_seed("augment", self._mixture.seed, n) if source.augment else None
            try:
                media = tuple(self._decode(medium, item.key, augment_seed) for medium in sample.media)
            except DataError as error:
                bad_samples.append(BadSample(name, str(error)))
                if not replace_images:
                    return LoadedSample(None, tuple(bad_samples))
            else:
                return LoadedSample(replace(sample, media=media), tuple(bad_samples))
        raise _no_readable_item(name, bad_samples)

    def _decode(self, item: MediaItem, key: str, augment_seed: int | None) -> MediaItem:
        """Return a media item decoded. Raises DataError; the images of one sample are augmented alike."""
        assert not isinstance(item.content, DecodedImage), key
        return MediaItem(item.modality, self._images.decode(item.content, key=key, augment_seed=augment_seed))

    def length(self, n: int) -> tuple[int, int]:
        draw = self._mixture.draw(n)
        name, source = self._mixture.names[draw.source], self._sources[draw.source]
        bad_samples: list[BadSample] = []
        for _, sample in self._rendered(n, draw, source.read_text or source.items.__getitem__, bad_samples):
            return len(sample.token_ids), len(sample.media)
        raise _no_readable_item(name, bad_samples)

    def _rendered(
        self, n: int, draw: SourceDraw, read: Callable[[int], Item], bad_samples: list[BadSample]
    ) -> Iterator[tuple[Item, Sample]]:
        """Yield the candidates for sample n whose text is good; append the bad ones before them to ``bad_samples``."""
        name = self._mixture.names[draw.source]
        for index in self._candidates(n, draw):
            try:
                with sample_errors(f"item {index} of source {name}"):
                    item = read(index)
                location = partial(self._location, draw.source, index, item)
                with sample_errors(location):
                    item.key.encode()  # keys are hashed and logged; half a surrogate pair cannot be
                    sample = self._render(item if self._prepare is None else self._prepare(item, n))
                if sample is None:
                    raise DataError(f"{location()}: no supervised token (empty, or truncated at the length limit)")
            except DataError as error:
                bad_samples.append(BadSample(name, str(error)))
            else:
                yield item, sample

    def _location(self, source: int, index: int, item: Item) -> str:
        locate = self._sources[source].locate
        return locate(index) if locate is not None else item.key

    def _candidates(self, n: int, draw: SourceDraw) -> Iterator[int]:
        """Yield the item of sample n, then its replacements."""
        source = self._sources[draw.source]
        num_items, order = len(source.items), source.order
        if order:
            yield order.item_index(draw.draw_index)
        else:
            yield self._mixture.item_index(draw.source, draw.draw_index, num_items)
        for attempt in range(1, MAX_ATTEMPTS):
            if order:
                yield order.replacement_index(draw.draw_index, attempt)
            else:
                yield self._mixture.replacement_index(n, attempt, num_items)


def _no_readable_item(name: str, bad_samples: Sequence[BadSample]) -> BadSampleBudgetExceeded:
    listing = "\n  ".join(list(dict.fromkeys(bad.reason for bad in bad_samples))[:5])
    return BadSampleBudgetExceeded(
        f"Source {name} gave no readable sample in {MAX_ATTEMPTS} attempts: data.max_bad_fraction is for a few bad "
        f"ones, here all seem to be. Repair the source, or leave it out. The first:\n  {listing}"
    )
