"""What is validated on: sources and splits, the deal to data ranks, bad samples, the order that training keeps."""

from collections import Counter
from pathlib import Path

import pytest
from data_files import image_bytes, write_sources, write_tar

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.bad_samples import BadSampleBudgetExceeded
from aki_megatron.data.packing import PackingLimits
from aki_megatron.data.pipeline import build_tokenizer
from aki_megatron.data.validation_set import (
    ValidationPlanner,
    ValidationSet,
    build_validation_set,
    missing_validation_files,
    validation_sources,
)
from aki_megatron.errors import ConfigError
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset

ROOT = Path(__file__).resolve().parents[2]


class LengthStream:
    """Samples of 3 to 9 positions and one image."""

    def length(self, n: int) -> tuple[int, int]:
        return 3 + n % 7, 1


@pytest.mark.parametrize("packing", [None, (PackingLimits(12, 3), 5)])
@pytest.mark.parametrize(("data_size", "micro_batch_size", "num_microbatches"), [(1, 4, 1), (3, 2, 2), (8, 1, 3)])
def test_every_sample_is_dealt_once(
    packing: tuple[PackingLimits, int] | None, data_size: int, micro_batch_size: int, num_microbatches: int
) -> None:
    sizes = [11, 1, 7]
    found: Counter[tuple[int, int]] = Counter()
    rounds = set()
    for rank in range(data_size):
        planner = ValidationPlanner(
            [LengthStream()] * 3,  # type: ignore[list-item]
            sizes,
            micro_batch_size=micro_batch_size,
            num_microbatches=num_microbatches,
            data_rank=rank,
            data_size=data_size,
            packing=packing,
        )
        rounds.add(len(planner.plans))
        for plan in planner.plans:
            assert len(plan.microbatches) == num_microbatches
            for microbatch in plan.microbatches:
                assert 1 <= len(microbatch.sequences) <= micro_batch_size
                found.update((microbatch.phase, n) for _, numbers in microbatch.sequences for n in numbers)
                if packing:
                    for _, numbers in microbatch.sequences:
                        assert sum(LengthStream().length(n)[0] for n in numbers) <= 12 and len(numbers) <= 3
        steps = planner.plan_steps(0)
        assert [next(steps) for _ in planner.plans] == planner.plans
        assert all(sequence == (0, ()) for part in next(steps).microbatches for sequence in part.sequences), (
            "then empty"
        )
    assert len(rounds) == 1, "all ranks have as many rounds"
    assert found == Counter((source, n) for source, size in enumerate(sizes) for n in range(size))


@pytest.fixture(scope="module")
def demo_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo_data")
    write_dataset(root, DatasetSize(8, 8), lambda done: None)
    return root


def demo(root: Path, *flags: str, kind: str = "sft") -> RunConfig:
    config = ROOT / f"configs/demo/{kind}.yaml"
    arguments = ["--config", str(config), "--data.root", str(root), "--validation.interval", "5", *flags]
    arguments += ["--data.tokenizer", str(root / "tokenizer"), "--train.global_batch_size", "8"]
    return load_run(arguments, default_config=config, prog="sft.py", description="")


def opened(config: RunConfig, rank: int = 0, ranks: int = 1) -> ValidationSet:
    return build_validation_set(
        config,
        build_tokenizer(config),
        world_size=ranks,
        data_rank=rank,
        data_size=ranks,
        pin_memory=False,
        progress=lambda line: None,
    )


def loaded_keys(validation_set: ValidationSet) -> list[str]:
    """The keys of all samples in order."""
    streams = validation_set.dataset._streams
    return [
        streams[part.phase].sample(n).sample.key
        for plan in validation_set.planner.plans
        for part in plan.microbatches
        for _, numbers in part.sequences
        for n in numbers
    ]


def test_the_samples_are_of_the_split_and_depend_on_nothing_else(demo_root: Path) -> None:
    keys = loaded_keys(opened(demo(demo_root, "--validation.samples", "6")))
    assert len(keys) == len(set(keys)) == 6 + 4 + 6 + 6, "vsr has 4"
    others = ("--train.seed", "77", "--data.phases", "[{steps: 1600, sources: [vsr]}]", "--data.mixing", "uniform")
    assert loaded_keys(opened(demo(demo_root, "--validation.samples", "6", *others))) == keys
    both = [loaded_keys(opened(demo(demo_root, "--validation.samples", "6"), rank, 2)) for rank in (0, 1)]
    assert sorted(both[0] + both[1]) == sorted(keys)
    everything = loaded_keys(opened(demo(demo_root, "--validation.samples", "0")))
    assert set(keys) < set(everything) and len(everything) == len(set(everything))
    train = loaded_keys(opened(demo(demo_root, "--validation.samples", "0", "--validation.split", "train")))
    ids = [{key for key in found if key.startswith("vqav2/")} for found in (train, everything)]
    assert all(ids) and not ids[0] & ids[1], "ids of other datasets are numbers that start anew in each split"


def test_sources_without_the_split_are_left_out_or_refused(demo_root: Path) -> None:
    sources = "[{name: vsr}, {name: visualgenome}]"
    assert [entry.name for entry in validation_sources(demo(demo_root, "--data.sources", sources))] == ["vsr"]
    with pytest.raises(ConfigError, match="needs a source with split val, and none of data.sources visualgenome"):
        validation_sources(demo(demo_root, "--data.sources", "[{name: visualgenome}]"))
    named = demo(demo_root, "--data.sources", "[{name: visualgenome}]", "--validation.sources", "[{name: vsr}]")
    assert [entry.name for entry in validation_sources(named)] == ["vsr"]
    with pytest.raises(ConfigError, match="visualgenome"):
        missing_validation_files(demo(demo_root, "--validation.sources", "[{name: visualgenome}]"))


def test_missing_files_are_named_before_the_start(demo_root: Path, tmp_path: Path) -> None:
    assert missing_validation_files(demo(demo_root)) == []
    write_sources(tmp_path)
    missing = missing_validation_files(demo(tmp_path))
    assert missing and all("validation" in text for text in missing)
    captions = '[{name: val, shards: ["nowhere/{00..01}.tar"]}]'
    (first, second) = missing_validation_files(demo(demo_root, "--validation.captions", captions, kind="pretrain"))
    assert "nowhere/00.tar (validation.captions val)" in first and "01.tar" in second
    assert missing_validation_files(demo(tmp_path, "--validation.interval", "0")) == []


def test_captions(demo_root: Path) -> None:
    captions = '[{name: val, shards: ["captions/00000.tar"]}]'
    config = demo(demo_root, "--validation.captions", captions, "--validation.samples", "5", kind="pretrain")
    keys = loaded_keys(opened(config))
    assert len(set(keys)) == 5 and loaded_keys(opened(config)) == keys


def caption_run(tmp_path: Path, demo_root: Path, good: int, bad: int) -> RunConfig:
    members = []
    for number in range(good + bad):
        image = image_bytes(number) if number >= bad else b"no image"
        members += [(f"{number:03d}.jpg", image), (f"{number:03d}.txt", f"a thing {number}".encode())]
    tar = write_tar(tmp_path / "val.tar", members)
    flags = ["--validation.captions", f'[{{name: val, shards: ["{tar}"]}}]', "--validation.samples", "0"]
    return demo(demo_root, *flags, "--data.max_bad_fraction", "0.001", kind="pretrain")


def test_bad_samples_are_replaced_and_counted_anew_in_every_validation(tmp_path: Path, demo_root: Path) -> None:
    validation_set = opened(caption_run(tmp_path, demo_root, good=12, bad=4))
    for _ in range(3):
        loader = validation_set.open_loader()
        rounds = loader.steps(0)
        batches = [batch for _ in validation_set.planner.plans for batch in next(rounds).batches]
        loader.close()
        assert sum(batch.num_bad_samples for batch in batches) == loader.bad_sample_budget.counts["val"] >= 4
        assert sum(int((batch.segment_ids == 0).any(dim=1).sum()) for batch in batches) == 16


def test_too_many_bad_samples_end_the_validation(tmp_path: Path, demo_root: Path) -> None:
    validation_set = opened(caption_run(tmp_path, demo_root, good=12, bad=12))
    loader = validation_set.open_loader()
    rounds = loader.steps(0)
    with pytest.raises(BadSampleBudgetExceeded, match=r"(?s)more than data.max_bad_fraction=0.001 allows.*val/0"):
        for _ in validation_set.planner.plans:
            next(rounds)
    loader.close()


def test_a_source_without_readable_samples_is_refused_at_the_start(tmp_path: Path, demo_root: Path) -> None:
    with pytest.raises(BadSampleBudgetExceeded, match="Source val gave no readable sample"):
        opened(caption_run(tmp_path, demo_root, good=0, bad=12))
