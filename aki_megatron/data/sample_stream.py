"""The numbered samples of a phase: sample n is a pure function of (seed, n), for any caller, in any order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.bad_samples import BadSample, BadSampleBudgetExceeded, sample_errors
from aki_megatron.data.media import Decoders, decode_item
from aki_megatron.data.mixture import Mixture, SourceDraw
from aki_megatron.data.permutation import derive_seed
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.errors import DataError
from aki_megatron.types import Caption, Conversation, Sample

NO_RESPONSE = "no supervised token (empty, or truncated at the length limit)"

MAX_ATTEMPTS = 100
"""Items tried for one sample before its source is given up."""

Item = TypeVar("Item", Conversation, Caption)
ItemRead = TypeVar("ItemRead", Conversation, Caption, covariant=True)


@dataclass(frozen=True)
class LoadedSample:
    """A numbered sample with its media decoded, None where it is left out, and the bad samples met on the way."""

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


def read_item(
    source: Source[Item], index: int, render: Callable[[Item], Sample | None], *, read: Callable[[int], Item], name: str
) -> tuple[Item, Sample]:
    """Return item ``index`` of a source as ``read`` gives it, and as ``render`` does.

    Raises DataError, which says where the item is, whatever goes wrong with it.
    """

    def location() -> str:
        if source.locate is not None:
            return source.locate(index)
        return f"item {index} of source {name}" if item is None else item.key

    item: Item | None = None
    with sample_errors(location):
        item = read(index)
        item.key.encode()  # keys are hashed and logged; half a surrogate pair cannot be
        sample = render(item)
        if sample is None:
            raise DataError(f"{location()}: {NO_RESPONSE}")
    return item, sample


class MixtureStream(Generic[Item]):
    """Draw from a mixture, render, decode, and replace bad items, for captions or for conversations.

    A bad item (unreadable image or recording, malformed record, text that is refused, no supervised token, or whatever
    else a decoder or the tokenizer raises at it) is replaced by another of the same source, chosen by (seed, n,
    attempt), so the proportions of the sources stay.
    """

    def __init__(
        self,
        sources: Mapping[str, Source[Item]],
        mixture: Mixture,
        render: Callable[[Item], Sample | None],
        *,
        decoders: Decoders,
        prepare: Callable[[Item, int], Item] | None = None,
    ) -> None:
        """Draw from ``mixture``; ``prepare`` returns an item as sample number n takes it, None: as it is.

        decoders  of all modalities that ``render`` lets pass
        """
        assert set(mixture.names) == set(sources), (mixture.names, sorted(sources))
        self._sources: list[Source[Item]] = [sources[name] for name in mixture.names]
        self._mixture = mixture
        self._render: Callable[[Item], Sample | None] = render
        self._prepare: Callable[[Item, int], Item] | None = prepare
        self._decoders = decoders

    def sample(self, n: int, *, replace_images: bool = True) -> LoadedSample:
        draw = self._mixture.draw(n)
        name, source = self._mixture.names[draw.source], self._sources[draw.source]
        bad_samples: list[BadSample] = []
        for index, item, sample in self._rendered(n, draw, source.items.__getitem__, bad_samples):
            augment_seed = derive_seed("augment", self._mixture.seed, n) if source.augment else None
            try:
                # the images of one sample are augmented alike
                media = tuple(decode_item(medium, self._decoders, item.key, augment_seed) for medium in sample.media)
            except DataError as error:
                # a file is named by the error; encoded bytes are a part of what ``locate`` names
                encoded = any(isinstance(medium.content, bytes) for medium in sample.media)
                file = f"{source.locate(index)}: " if source.locate and encoded else ""
                bad_samples.append(BadSample(name, f"{file}{error}"))
                if not replace_images:
                    return LoadedSample(None, tuple(bad_samples))
            else:
                return LoadedSample(replace(sample, media=media), tuple(bad_samples))
        raise _no_readable_item(name, bad_samples)

    def length(self, n: int) -> tuple[int, int]:
        draw = self._mixture.draw(n)
        name, source = self._mixture.names[draw.source], self._sources[draw.source]
        bad_samples: list[BadSample] = []
        for _, _, sample in self._rendered(n, draw, source.read_text or source.items.__getitem__, bad_samples):
            return len(sample.token_ids), len(sample.media)
        raise _no_readable_item(name, bad_samples)

    def _rendered(
        self, n: int, draw: SourceDraw, read: Callable[[int], Item], bad_samples: list[BadSample]
    ) -> Iterator[tuple[int, Item, Sample]]:
        """Yield the candidates for sample n whose text is good: index, item, sample.

        The bad ones before each are appended to ``bad_samples``.
        """
        name, source = self._mixture.names[draw.source], self._sources[draw.source]
        prepare = self._prepare
        render = self._render if prepare is None else lambda item: self._render(prepare(item, n))
        for index in self._candidates(n, draw):
            try:
                item, sample = read_item(source, index, render, read=read, name=name)
            except DataError as error:
                bad_samples.append(BadSample(name, str(error)))
            else:
                yield index, item, sample

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
