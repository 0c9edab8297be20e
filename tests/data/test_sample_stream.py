"""Sample n is a pure function of (seed, n); bad samples are counted, replaced the same way, and budgeted."""

from collections import Counter
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from data_files import IMAGE_DECODERS, IMAGE_SIZE, image_bytes, pairs, write_sources, write_tar
from PIL import Image

from aki_megatron.data.bad_samples import ALWAYS_TOLERATED, BadSample, BadSampleBudget, BadSampleBudgetExceeded
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.sample_stream import MixtureStream, Source
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.data.sources import open_sources
from aki_megatron.types import Conversation, DecodedImage, Sample, Turn, image_items

WEIGHTS = {"vqav2": 0.4, "vsr": 0.1, "aokvqa": 0.2, "refcoco": 0.3}


class CountingStream:
    """A stream whose bad samples are counted as a loader counts them."""

    def __init__(self, stream: MixtureStream, budget: float) -> None:
        self.stream = stream
        self.bad_sample_budget = BadSampleBudget(budget)

    def sample(self, n: int) -> Sample:
        loaded = self.stream.sample(n)
        self.bad_sample_budget.record(1, loaded.bad_samples)
        assert loaded.sample is not None
        return loaded.sample


@pytest.fixture
def conversations(source_root: Path, make_template):
    def make(root: Path = source_root, *, seed: int = 1, budget: float = 0.001, **template) -> CountingStream:
        sources = {name: Source(items) for name, items in open_sources(root, list(WEIGHTS), "train").items()}
        render = make_template(**template).render_conversation
        return CountingStream(
            MixtureStream(sources, Mixture(WEIGHTS, seed=seed), render, decoders=IMAGE_DECODERS),
            budget,
        )

    return make


@pytest.fixture
def captions(tmp_path: Path, make_template):
    def make(*, seed: int = 1, budget: float = 0.001) -> CountingStream:
        dataset = CaptionDataset(["c/{00000..00001}.tar"], tmp_path)
        source = Source(dataset, order=ShardOrder(dataset.counts, seed=seed), read_text=dataset.caption)
        mixture, render = Mixture({"captions": 1.0}, seed=seed), make_template(128).render_caption
        return CountingStream(
            MixtureStream({"captions": source}, mixture, render, decoders=IMAGE_DECODERS),
            budget,
        )

    write_tar(tmp_path / "c/00000.tar", pairs(5))
    write_tar(tmp_path / "c/00001.tar", pairs(6, first=5))
    return make


def test_a_sample_depends_on_seed_and_number_only(conversations) -> None:
    one, other = conversations(), conversations()
    forward = [one.sample(n) for n in range(60)]
    backward = [other.sample(n) for n in reversed(range(60))][::-1]
    assert forward == backward == [one.sample(n) for n in range(60)]
    assert forward != [conversations(seed=2).sample(n) for n in range(60)]
    assert isinstance(forward[0].images[0], DecodedImage) and forward[0].images[0].size == IMAGE_SIZE


def test_proportions_and_coverage(conversations) -> None:
    stream = conversations()
    keys = Counter(stream.sample(n).key for n in range(1000))
    sources = Counter(key.split("/")[0] for key in keys.elements())
    assert sources == {"vqav2": 400, "vsr": 100, "aokvqa": 200, "refcoco": 300}
    for source in WEIGHTS:
        counts = [count for key, count in keys.items() if key.startswith(source + "/")]
        assert len(counts) == 12 and max(counts) - min(counts) <= 1
    assert stream.bad_sample_budget.counts.total() == 0 and stream.bad_sample_budget.num_requested == 1000


def test_captions_each_once_per_epoch(captions) -> None:
    stream = captions()
    keys = [stream.sample(n).key for n in range(22)]
    assert sorted(keys[:11]) == sorted(keys[11:]) == sorted(set(keys)) and keys[:11] != keys[11:]
    assert all(key.startswith("c/0000") for key in keys)


def test_an_unreadable_image_is_counted_and_replaced_the_same_way(conversations, tmp_path: Path) -> None:
    write_sources(tmp_path)
    clean = [conversations(tmp_path).sample(n) for n in range(12)]
    bad = tmp_path / "VQA/train2014/COCO_train2014_000000000003.jpg"
    bad.write_bytes(image_bytes(3)[:100])
    stream, again = conversations(tmp_path, budget=1.0), conversations(tmp_path, budget=1.0)
    samples = [stream.sample(n) for n in range(200)]
    assert samples == [again.sample(n) for n in reversed(range(200))][::-1]
    assert not any(sample.key in ("vqav2/what_color_is_the/30", "refcoco/region/3") for sample in samples)
    for before, after in zip(clean, samples, strict=False):  # only the bad ones changed, and within their source
        assert before == after or before.key.endswith(("/3", "/30"))
        assert before.key.split("/")[0] == after.key.split("/")[0]
    assert set(stream.bad_sample_budget.counts) == {"vqav2", "refcoco"}
    assert stream.bad_sample_budget.counts == again.bad_sample_budget.counts
    assert all(str(bad) in reason for reason in stream.bad_sample_budget.first_reasons)


def test_damaged_shards_are_counted_and_replaced(captions, tmp_path: Path) -> None:
    tar = tmp_path / "c/00001.tar"
    tar.write_bytes(tar.read_bytes()[:8000])
    stream = captions(budget=0.5)
    samples = [stream.sample(n) for n in range(40)]
    assert len({sample.key for sample in samples}) >= 5
    assert 0 < stream.bad_sample_budget.counts["captions"] < 20
    assert "00001.tar, key 0000" in stream.bad_sample_budget.first_reasons[0]


def test_a_sample_without_supervised_tokens_is_counted_and_replaced(conversations, tmp_path: Path) -> None:
    write_sources(tmp_path)
    lines = (tmp_path / "vsr/train-random.jsonl").read_text().splitlines()
    lines[4] = lines[4].replace("dish", "dish " * 400)
    (tmp_path / "vsr/train-random.jsonl").write_text("\n".join(lines))
    stream = conversations(tmp_path, budget=1.0, max_text_tokens=200)
    keys = {stream.sample(n).key for n in range(300)}
    assert "vsr/relation/5" not in keys and "vsr/relation/4" in keys
    assert (
        stream.bad_sample_budget.counts.keys() == {"vsr"}
        and "no supervised token" in stream.bad_sample_budget.first_reasons[0]
    )


def test_budget(conversations, tmp_path: Path) -> None:
    write_sources(tmp_path)
    (tmp_path / "VQA/train2014/COCO_train2014_000000000003.jpg").write_bytes(b"")
    stream = conversations(tmp_path, budget=0.001)
    stopped = None
    for n in range(1000):
        try:
            stream.sample(n)
        except BadSampleBudgetExceeded as error:
            stopped = str(error)
            break
    assert stopped is not None and stream.bad_sample_budget.counts.total() == ALWAYS_TOLERATED + 1
    assert f"{ALWAYS_TOLERATED + 1} bad samples in" in stopped and "max_bad_fraction=0.001" in stopped
    assert stopped.count("000000000003.jpg") == 2  # each sample of it once, with its file
    strict = conversations(tmp_path, budget=0.0)
    with pytest.raises(BadSampleBudgetExceeded, match="1 bad samples in"):
        for n in range(1000):
            strict.sample(n)


def test_the_budget_is_a_fraction_once_there_are_many() -> None:
    budget = BadSampleBudget(0.01, num_good=9_900)
    budget.record(0, [BadSample("vsr", "x")] * 100)
    with pytest.raises(BadSampleBudgetExceeded, match="101 bad samples in 10001 requested .vsr 101."):
        budget.record(0, [BadSample("vsr", "x")])


@pytest.mark.parametrize(("fraction", "num_good", "num_bad"), [(0.5, 100, 100), (0.75, 100, 300), (1.0, 0, 1000)])
def test_bad_samples_are_a_part_of_those_asked_for(fraction: float, num_good: int, num_bad: int) -> None:
    budget = BadSampleBudget(fraction)
    budget.record(num_good, [BadSample("vsr", "x")] * num_bad)
    assert budget.num_requested == num_good + num_bad
    if fraction < 1:
        with pytest.raises(BadSampleBudgetExceeded):
            budget.record(0, [BadSample("vsr", "x")])


def test_a_source_without_any_readable_sample_ends_the_run(conversations, tmp_path: Path) -> None:
    write_sources(tmp_path, count=2)
    for file in (tmp_path / "VQA/train2014").iterdir():
        file.unlink()
    stream = conversations(tmp_path, budget=1.0)
    stream.bad_sample_budget.num_good = 10**9
    with pytest.raises(BadSampleBudgetExceeded, match="gave no readable sample in 100 attempts"):
        for n in range(50):
            stream.sample(n)


def test_length_is_known_without_decoding(conversations, captions) -> None:
    for stream in (conversations().stream, captions().stream):
        for n in range(30):
            sample = stream.sample(n).sample
            assert sample is not None
            assert stream.length(n) == (len(sample.token_ids), len(sample.media))


def test_in_a_packed_sequence_a_bad_image_leaves_its_sample_out(conversations, tmp_path: Path) -> None:
    """Its replacement might not fit."""
    write_sources(tmp_path)
    (tmp_path / "VQA/train2014/COCO_train2014_000000000003.jpg").write_bytes(b"")
    whole, stream = conversations().stream, conversations(tmp_path).stream
    num_left_out = 0
    for n in range(200):
        loaded = stream.sample(n, replace_images=False)
        if loaded.sample is None:
            num_left_out += 1
            assert len(loaded.bad_samples) == 1 and "000000000003.jpg" in loaded.bad_samples[0].reason
            assert stream.sample(n).sample is not None, "an unpacked run takes another"
        else:
            assert loaded.sample == whole.sample(n).sample and not loaded.bad_samples
        assert stream.length(n) == whole.length(n)
    assert num_left_out


def test_official_augmentation_changes_pixels_alone_and_purely(make_template) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, format="PNG")
    items = [
        Conversation(f"vqav2/count/{n}", (Turn("How many?", str(n)),), image_items(file.getvalue())) for n in range(8)
    ]

    def stream(augment: bool) -> MixtureStream:
        sources, mixture = {"vqav2": Source(items, augment=augment)}, Mixture({"vqav2": 1.0}, seed=1)
        return MixtureStream(sources, mixture, make_template().render_conversation, decoders=IMAGE_DECODERS)

    plain, augmented, again = ([stream(on).sample(n).sample for n in range(24)] for on in (False, True, True))
    assert augmented == again
    assert [sample.token_ids for sample in plain] == [sample.token_ids for sample in augmented]
    assert sum(one.images != other.images for one, other in zip(plain, augmented, strict=True)) > 12
