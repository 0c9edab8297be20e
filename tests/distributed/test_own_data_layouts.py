"""Files of one's own, several images a sample, on several ranks: the losses of one process, on the same samples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
from own_run import SOURCES, own_run, write_own_data

from aki_megatron.config.run import RunConfig
from aki_megatron.console import IsolatedConsole
from aki_megatron.data.loader import EmptyStepLoader
from aki_megatron.data.pipeline import build_tokenizer
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.build import build_engine, build_loader, partition_layers
from aki_megatron.types import StepReport

pytestmark = pytest.mark.distributed
STEPS, RATE, LIMIT = 3, 1e-2, 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, int], list[str]]] = {
    "DP2, ZeRO-2": (2, {}, ["--parallel.zero_stage", "2"]),
    "PP2, ZeRO-1": (2, {"pipeline": 2}, ["--parallel.zero_stage", "1"]),
    "PP2 x DP2, ZeRO-3": (4, {"pipeline": 2}, ["--parallel.zero_stage", "3"]),
}
"""Name -> ranks, sizes of the topology, flags."""
WAYS = {
    "padded": [],
    "packed": ["--data.packing.enabled", "true", "--data.packing.sequence_length", "160", "--data.packing.buffer_size",
               "24", "--train.global_batch_size", "4", "--train.micro_batch_size", "1"],
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a rank saw of the steps: their reports, and of what it reads the images of each micro-batch and the hash."""

    reports: list[StepReport]
    images: list[list[int]]
    hashes: list[int]


def train(topology: Topology, config: RunConfig) -> Trained:
    loader = build_loader(config, build_tokenizer(config), topology, IsolatedConsole(quiet=True))
    assert isinstance(loader, EmptyStepLoader) != topology.reads_data
    engine = build_engine(config, partition_layers(config), topology)
    trained = Trained([], [], [])
    try:
        for step in islice(loader.steps(0, None), STEPS):
            trained.images.append([sum(len(items) for items in batch.media.values()) for batch in step.batches])
            trained.hashes.append(step.samples_hash)
            trained.reports.append(engine.train_step(step.batches, RATE))
    finally:
        loader.close()
    return trained


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_own_data(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture(scope="module")
def plain(pool, root) -> Callable[[str], Trained]:
    """What one process does, by the way to make sequences."""

    @cache
    def trained(way: str) -> Trained:
        return pool.run(1, train, own_run(root, root / "run", *WAYS[way]))[0]

    return trained


@pytest.mark.parametrize("way", WAYS)
def test_one_process_reads_several_images_of_every_format(plain, way) -> None:
    """Otherwise equality would prove little."""
    trained = plain(way)
    counts = [count for step in trained.images for count in step]
    assert [sum(step) for step in trained.images] == [report.images for report in trained.reports]
    assert max(counts) > 3 and len(set(counts)) > 3 and len(counts) == 4 * STEPS
    assert [source["format"] for source in SOURCES] == ["llava", "messages", "parquet"]
    assert all(report.bad_samples == 0 for report in trained.reports) and len(set(trained.hashes)) == STEPS


CASES = [*(("padded", layout) for layout in LAYOUTS), ("packed", "PP2 x DP2, ZeRO-3")]


@pytest.mark.parametrize(("way", "layout"), CASES)
def test_losses_are_those_of_one_process(pool, plain, root, way, layout) -> None:
    ranks, sizes, flags = LAYOUTS[layout]
    for name, size in sizes.items():
        flags = [*flags, f"--parallel.{name}", str(size)]
    expected = plain(way)
    results = pool.run(ranks, train, own_run(root, root / "run", *WAYS[way], *flags), **sizes)
    for trained in results:
        for report, other in zip(trained.reports, expected.reports, strict=True):
            counts = [(r.supervised_tokens, r.tokens, r.images, r.bad_samples) for r in (report, other)]
            assert counts[0] == counts[1]
            assert report.loss == pytest.approx(other.loss, rel=LIMIT)
            assert report.grad_norm == pytest.approx(other.grad_norm, rel=LIMIT)
    readers = [trained for trained in results if any(trained.images)]
    assert len(readers) == ranks // sizes.get("pipeline", 1), "one for each data rank"
    hashes = zip(*(trained.hashes for trained in readers), strict=True)
    assert [sum(found) % 2**64 for found in hashes] == expected.hashes, "together they read the same samples"
