"""Whatever a reader, a tokenizer or a decoder raises at one sample is that sample's fault: named, counted, replaced."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import IMAGE_DECODERS, image_bytes, pairs, write_sources, write_tar
from PIL import Image

from aki_megatron.config.load import load_run
from aki_megatron.data.bad_samples import BadSampleBudget, BadSampleBudgetExceeded, sample_errors
from aki_megatron.data.batch_planner import BatchPlanner, Phase
from aki_megatron.data.captions import TextFormat
from aki_megatron.data.loader import MicrobatchDataset, StepLoader
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.pipeline import build_sources
from aki_megatron.data.sample_stream import MixtureStream, Source
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.types import Caption, Conversation, Sample, Turn, image_items

ROOT = Path(__file__).resolve().parents[2]


class PanicException(BaseException):
    """As the Rust code of tokenizers raises it."""


class Items(list[Conversation]):
    """Conversations; reading number 3 raises ``fault``."""

    fault: BaseException | None = None

    def __getitem__(self, index):
        if index == 3 and self.fault is not None:
            raise self.fault
        return super().__getitem__(index)


FAULTS = [AssertionError(), TypeError("TextInputSequence must be str"), MemoryError(), RecursionError("deep"),
          KeyError("id"), RuntimeError("a\nb"), PanicException("index out of bounds")]  # fmt: skip


def conversations(image: bytes | None = None) -> Items:
    return Items(Conversation(f"vqav2/count/{n}", (Turn("How many?", str(n)),), image_items(image)) for n in range(8))


def stream_of(items: Items, render: Callable, **source) -> MixtureStream:
    return MixtureStream(
        {"vqav2": Source(items, **source)},
        Mixture({"vqav2": 1.0}, seed=1),
        render,
        decoders=IMAGE_DECODERS,
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("where", ["read", "render", "decode"])
def test_any_error_of_one_sample_is_named_counted_and_replaced(
    fault: BaseException, where: str, make_template, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, template, opened = conversations(image_bytes()), make_template(), Image.open

    def render(item: Conversation) -> Sample | None:
        if where == "render" and item.key.endswith("/3"):
            raise fault
        return template.render_conversation(item)

    def failing_open(*arguments, **options):
        if where == "decode" and arguments[0].getvalue() == b"three":
            raise fault
        return opened(*arguments, **options)

    if where == "read":
        items.fault = fault
    items[3:4] = (
        [Conversation("vqav2/count/3", (Turn("How many?", "3"),), image_items(b"three"))]
        if where == "decode"
        else items[3:4]
    )
    monkeypatch.setattr("aki_megatron.data.image.Image.open", failing_open)
    stream, bad = stream_of(items, render), []
    for n in range(16):  # two passes
        loaded = stream.sample(n)
        assert loaded.sample is not None and loaded.sample.key != "vqav2/count/3"
        bad += loaded.bad_samples
        stream.length(n)
    assert len(bad) >= 2 and {one.source for one in bad} == {"vqav2"}
    named = {"read": "item 3 of source vqav2", "render": "vqav2/count/3", "decode": "image of sample vqav2/count/3"}
    assert all(one.reason.startswith(named[where]) and type(fault).__name__ in one.reason for one in bad)


def test_stop_signals_and_user_errors_pass() -> None:
    for error in (KeyboardInterrupt(), SystemExit(3), ConfigError("wrong flag")):
        with pytest.raises(type(error)), sample_errors("here"):
            raise error
    with pytest.raises(DataError, match="^here: AssertionError: no message$"), sample_errors("here"):
        raise AssertionError


def test_a_source_at_which_everything_fails_ends_the_run_with_the_reason(make_template) -> None:
    def render(item: Conversation) -> Sample | None:
        raise TypeError("no text")

    with pytest.raises(
        BadSampleBudgetExceeded, match=r"(?s)no readable sample in 100.*vqav2/count/\d: TypeError: no text"
    ):
        stream_of(conversations(), render).sample(0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_count_and_replace_too(num_workers: int, make_template) -> None:
    def render(item: Conversation) -> Sample | None:
        if item.key.endswith("/3"):
            raise AssertionError
        return make_template().render_conversation(item)

    stream = stream_of(conversations(), render)
    planner = BatchPlanner([Phase(100, stream)], global_batch_size=8, micro_batch_size=4)
    dataset = MicrobatchDataset([stream], pad_id=0, image_size=24, sequence_length=None)
    budget = BadSampleBudget(0.5)
    loader = StepLoader(planner, dataset, bad_sample_budget=budget, num_workers=num_workers)
    steps = loader.steps(0)
    assert [next(steps).num_samples for _ in range(3)] == [8] * 3
    loader.close()
    assert budget.counts["vqav2"] >= 3 and "vqav2/count/3: AssertionError" in budget.latest_reason


@pytest.mark.parametrize("half", ["\\ud83d", "\\udc00 after", "before \\udfff"])
def test_half_a_surrogate_pair_in_ocr_json_is_an_error_of_its_sample(half: str, tmp_path: Path, make_template) -> None:
    def description(text: str) -> bytes:
        return f'[{{"text": "{text}", "granularity": 0, "include_datacomp_raw_cap": false}}]'.encode()

    members = [("0.jpg", image_bytes(0)), ("0.txt", description(half)), ("1.jpg", image_bytes(9)),
               ("1.txt", description("\\ud83d\\ude00"))]  # fmt: skip
    tar = write_tar(tmp_path / "00000.tar", members)
    dataset = CaptionDataset(["00000.tar"], tmp_path, text_format=TextFormat("blip3_ocr"))
    assert dataset.caption(1).text == "\U0001f600"
    stream = MixtureStream(
        {"ocr": Source(dataset)},
        Mixture({"ocr": 1.0}, seed=0),
        make_template().render_caption,
        decoders=IMAGE_DECODERS,
    )
    bad = [bad.reason for n in range(6) for bad in stream.sample(n).bad_samples]
    assert bad and all(reason.startswith(f"Tar {tar}, key 0: character ") for reason in bad)
    assert all("half a surrogate pair (\\ud" in reason for reason in bad)


def test_half_a_surrogate_pair_in_an_id_is_an_error_of_its_sample(make_template) -> None:
    items = conversations()
    items[3] = Conversation(json.loads('"vqav2/count/\\ud800"'), (Turn("How many?", "3"),))
    items[4] = Conversation(
        "vqav2/count/4", (Turn("How many?", "4"),), image_items(Path(json.loads('"/no/\\ud800.jpg"')))
    )
    items[5] = Conversation("vqav2/count/5", (Turn("How many?", "5"),), image_items(Path("/no/\0.jpg")))
    stream = stream_of(items, make_template().render_conversation)
    reasons = {bad.reason for n in range(16) for bad in stream.sample(n).bad_samples}
    assert len(reasons) == 3 and sum("\\ud800" in reason for reason in reasons) == 2
    for reason in reasons:
        reason.encode()


def test_a_bad_sample_of_a_run_names_annotation_file_or_tar(tmp_path: Path, make_template) -> None:
    tar = write_tar(tmp_path / "c/00000.tar", pairs(2))
    dataset = CaptionDataset(["c/00000.tar"], tmp_path)

    def render(caption: Caption) -> Sample | None:
        if caption.key.endswith("1"):
            raise TypeError("TextInputSequence must be str")
        return make_template().render_caption(caption)

    source = Source(dataset, locate=dataset.location)
    stream = MixtureStream({"c": source}, Mixture({"c": 1.0}, seed=0), render, decoders=IMAGE_DECODERS)
    reasons = {bad.reason for n in range(4) for bad in stream.sample(n).bad_samples}
    assert reasons == {f"Tar {tar}, key 000001: TypeError: TextInputSequence must be str"}


def test_an_image_in_a_tar_is_named_by_tar_and_key(tmp_path: Path, make_template) -> None:
    tar = write_tar(tmp_path / "c/00000.tar", [("0.jpg", b"no image"), ("0.txt", b"a"), *pairs(1, first=1)])
    dataset = CaptionDataset(["c/00000.tar"], tmp_path)
    source = Source(dataset, locate=dataset.location)
    mixture, render = Mixture({"c": 1.0}, seed=0), make_template().render_caption
    stream = MixtureStream({"c": source}, mixture, render, decoders=IMAGE_DECODERS)
    (reason,) = {bad.reason for n in range(4) for bad in stream.sample(n).bad_samples}
    assert reason.startswith(f"Tar {tar}, key 0: image of sample c/00000/0 is not a readable image but text")


def test_a_record_that_cannot_be_read_is_named_by_its_file(tmp_path: Path, make_template, monkeypatch) -> None:
    write_sources(tmp_path, count=3)
    flags = ["--data.root", str(tmp_path), "--data.sources", "[{name: vqav2}]"]
    config = load_run(flags, default_config=ROOT / "configs/demo/sft.yaml", prog="", description="")
    source = build_sources(config.data, lambda line: None)["vqav2"]
    read = type(source.items).__getitem__

    def failing(items, index: int):
        if index == 1:
            raise RuntimeError("torn")
        return read(items, index)

    monkeypatch.setattr(type(source.items), "__getitem__", failing)
    mixture, render = Mixture({"vqav2": 1.0}, seed=0), make_template().render_conversation
    stream = MixtureStream({"vqav2": source}, mixture, render, decoders=IMAGE_DECODERS)
    (reason,) = {bad.reason for n in range(9) for bad in stream.sample(n).bad_samples}
    assert reason.startswith(f"{tmp_path}/VQA/v2_") and reason.endswith(", sample number 1: RuntimeError: torn")
