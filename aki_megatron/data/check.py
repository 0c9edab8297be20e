"""Read everything that a run would read, once, and count what it finds: tools/make_data.py check.

The texts of a source are read and tokenized first; then every image file is decoded once, however many samples use it.
Images in tars are decoded with their samples.
"""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from aki_megatron.config.run import RunConfig
from aki_megatron.data.bad_samples import num_tolerated
from aki_megatron.data.fault_kinds import FaultCounts, fault_kind
from aki_megatron.data.media import Decoders, media_decoders
from aki_megatron.data.pipeline import build_sources, build_template, build_tokenizer, image_options
from aki_megatron.data.run_sources import SPLIT
from aki_megatron.data.sample_stream import Source, read_item
from aki_megatron.data.sources.records import LazyConversations
from aki_megatron.data.validation_set import validation_sources
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.types import MEDIA_MODALITIES, Modality, Sample

MISSING_IMAGE = "the image file is missing"

VALIDATION = "validation"
"""In the names of sources that are validated on."""

_CHUNK = 256
"""Samples or images of one task of a worker process."""

_PENDING_PER_WORKER = 4

Progress = Callable[[str, int, int], None]
"""Called with what is done (``vqav2: texts``), how many are done, and how many there are."""


@dataclass
class SourceCheck:
    """What was found in one source.

    num_records     records of the source, with those of ``malformed``
    num_checked     records that were looked at, with those of ``malformed``
    num_readable    of those, samples with a good text and a good image
    num_over_cap    samples that are longer than data.max_text_tokens, and so are cut
    token_counts    length of a sample in text tokens, before it is cut -> number of samples
    image_uses      image file -> number of samples with a good text that use it
    images_together files of a sample with a good text that uses several -> number of such samples
    num_missing     samples whose image file does not exist
    malformed       records of annotation files that cannot be used
    faults          samples that cannot be used
    """

    name: str
    num_records: int = 0
    num_checked: int = 0
    num_readable: int = 0
    num_over_cap: int = 0
    num_missing: int = 0
    token_counts: Counter[int] = field(default_factory=Counter)
    image_uses: Counter[str] = field(default_factory=Counter)
    images_together: Counter[frozenset[str]] = field(default_factory=Counter)
    malformed: FaultCounts = field(default_factory=FaultCounts)
    faults: FaultCounts = field(default_factory=FaultCounts)
    notes: list[str] = field(default_factory=list)
    """What a run says when it opens the tars: those with unreadable samples, those that are missing."""
    cannot_open: str = ""
    """Why the source cannot be opened at all."""

    def is_refused(self, max_bad_fraction: float) -> bool:
        """Return whether a run would stop: the source cannot be opened, or too much of it is bad."""
        num_bad = self.malformed.total + self.faults.total
        return bool(self.cannot_open) or num_bad > num_tolerated(max_bad_fraction, self.num_checked)


def check_run_data(
    config: RunConfig, *, max_samples: int, num_workers: int, progress: Progress
) -> Iterator[SourceCheck]:
    """Check every source of a run in turn, then those of its validation.

    max_samples  most samples of each source, evenly spaced; 0: all
    num_workers  worker processes; 0: this process

    Raises UserError for what no source can be read without, as the tokenizer.
    """
    template = build_template(config, build_tokenizer(config))
    key = "captions" if config.data.kind == "captions" else "sources"
    parts = [(entry.name, entry, SPLIT) for entry in getattr(config.data, key)]
    if config.validation.interval:
        validated = validation_sources(config)
        parts += [(f"{entry.name} ({VALIDATION})", entry, config.validation.split) for entry in validated]
    for name, entry, split in parts:
        # what is bad is counted here, however much it is
        data = config.data.model_copy(update={key: (entry,), "max_bad_fraction": 1.0})
        try:
            notes: list[str] = []
            source = build_sources(data, notes.append, split)[entry.name]
        except (ConfigError, DataError) as error:
            yield SourceCheck(name, cannot_open=str(error))
            continue
        render: Callable[[Any], Any] = template.render_conversation
        if config.data.kind == "captions":
            render = template.render_caption
        checker = _Checker(name, source, render, media_decoders(config.model, image_options(config.data)))
        found = checker.check(max_samples, num_workers, progress)
        if config.data.kind == "captions":  # faults of annotation files are in ``malformed``
            found.notes = notes
        yield found


class _Checker:
    """Check one source. Its methods that take a part of the work run in worker processes."""

    def __init__(
        self, name: str, source: Source[Any], render: Callable[[Any], Sample | None], decoders: Decoders
    ) -> None:
        self.name, self.source, self.render, self.decoders = name, source, render, decoders

    def check(self, max_samples: int, num_workers: int, progress: Progress) -> SourceCheck:
        items = self.source.items
        malformed = items.faults if isinstance(items, LazyConversations) else FaultCounts()
        num_samples = min(max_samples or len(items), len(items))
        indices: Sequence[int] = range(len(items))
        if num_samples < len(items):
            indices = [number * len(items) // num_samples for number in range(num_samples)]
        found = SourceCheck(self.name, malformed=malformed)
        first_keys: dict[str, tuple[str, Modality]] = {}
        texts = _run(self, "check_samples", indices, num_workers, partial(progress, f"{self.name}: samples"))
        for part, keys in texts:
            _merge(found, part)
            first_keys = {**keys, **first_keys}
        images = list(first_keys.items())
        bad = dict[str, str]()
        for part in _run(self, "check_images", images, num_workers, partial(progress, f"{self.name}: images")):
            bad.update(part)
        for image, num_bad in _samples_of_bad_images(found, bad):
            _add_bad_image(found, image, first_keys[image][0], bad[image], num_bad)
        found.num_records = len(items) + malformed.total
        found.num_checked = num_samples + malformed.total
        return found

    def check_samples(self, indices: Sequence[int]) -> tuple[SourceCheck, dict[str, tuple[str, Modality]]]:
        """Return what some samples hold, media files left out, and the first key that uses each file, and as what."""
        found, keys = SourceCheck(self.name), dict[str, tuple[str, Modality]]()
        for index in indices:
            key = ""
            try:
                item, sample = read_item(
                    self.source, index, self.render, read=self.source.items.__getitem__, name=self.name
                )
                key = item.key
                for medium in item.media:
                    if isinstance(medium.content, bytes):
                        self.decoders[medium.modality].decode(medium.content, key=key)
            except DataError as error:
                reason = str(error)
                found.faults.record(fault_kind(reason.replace(key, "...") if key else reason), reason)
                continue
            num_media = sum(kind in MEDIA_MODALITIES for kind in sample.modality_ids)
            num_text = len(sample.token_ids) - num_media + len(sample.media)  # a media item counts as one
            found.token_counts[num_text + sample.num_cut_tokens] += 1
            found.num_over_cap += sample.num_cut_tokens > 0
            found.num_readable += 1
            files = {str(medium.content): medium.modality for medium in item.media if isinstance(medium.content, Path)}
            found.image_uses.update(files.keys())
            if len(files) > 1:
                found.images_together[frozenset(files)] += 1
            for file, modality in files.items():
                keys.setdefault(file, (key, modality))
        return found, keys

    def check_images(self, images: Sequence[tuple[str, tuple[str, Modality]]]) -> list[tuple[str, str]]:
        """Return those of some media files (path, key and modality of a sample) that cannot be decoded, and why."""
        bad = []
        for image, (key, modality) in images:
            try:
                self.decoders[modality].decode(Path(image), key=key)
            except DataError as error:
                bad.append((image, str(error) if _exists(image) else MISSING_IMAGE))
        return bad


def _exists(image: str) -> bool:
    try:
        return Path(image).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _samples_of_bad_images(found: SourceCheck, bad: Collection[str]) -> Iterator[tuple[str, int]]:
    """Yield each bad image with the number of its samples; a sample with several is counted at the first of them."""
    together: dict[str, list[tuple[frozenset[str], int]]] = {image: [] for image in bad}
    for files, num_samples in found.images_together.items():
        for image in files & together.keys():
            together[image].append((files, num_samples))
    seen = set[str]()
    for image in bad:
        counted = sum(num_samples for files, num_samples in together[image] if files & seen)
        seen.add(image)
        yield image, found.image_uses[image] - counted


def _add_bad_image(found: SourceCheck, image: str, key: str, reason: str, num_samples: int) -> None:
    """Count the samples of an image that cannot be decoded."""
    if not num_samples:
        return
    message = reason if image in reason else f"image {image} of sample {key}: {reason}"
    kind = fault_kind(reason.replace(image, "...").replace(key, "..."))
    found.faults.record(kind, message, num_samples)
    found.num_readable -= num_samples
    found.num_missing += num_samples if reason == MISSING_IMAGE else 0


def _merge(found: SourceCheck, part: SourceCheck) -> None:
    found.num_readable += part.num_readable
    found.num_over_cap += part.num_over_cap
    found.token_counts.update(part.token_counts)
    found.image_uses.update(part.image_uses)
    found.images_together.update(part.images_together)
    found.faults.update(part.faults)


def _run(
    checker: _Checker, method: str, work: Sequence[Any], num_workers: int, progress: Callable[[int, int], None]
) -> Iterator[Any]:
    """Yield what a method of the checker makes of each part of the work, in order."""
    chunks = (work[begin : begin + _CHUNK] for begin in range(0, len(work), _CHUNK))
    num_done = 0
    progress(0, len(work))
    if num_workers < 2 or len(work) <= _CHUNK:
        results: Iterator[Any] = map(getattr(checker, method), chunks)
    else:
        results = _run_in_processes(checker, method, chunks, num_workers)
    for result in results:
        num_done = min(num_done + _CHUNK, len(work))
        progress(num_done, len(work))
        yield result


def _run_in_processes(
    checker: _Checker, method: str, chunks: Iterator[Sequence[Any]], num_workers: int
) -> Iterator[Any]:
    pending: deque[Future[Any]] = deque()
    # forked: the records of the source are shared with this process, not copied
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_set_checker, initargs=(checker,))
    try:
        for chunk in chunks:
            pending.append(pool.submit(_call_checker, method, chunk))
            if len(pending) > _PENDING_PER_WORKER * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError("A checking process was killed (out of memory?); give fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


_checkers: list[_Checker] = []
"""In a worker process: what it checks."""


def _set_checker(checker: _Checker) -> None:
    _checkers[:] = [checker]


def _call_checker(method: str, chunk: Sequence[Any]) -> Any:
    return getattr(_checkers[0], method)(chunk)
