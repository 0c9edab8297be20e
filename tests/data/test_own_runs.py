"""Users' own files in a run: fingerprints, the order of samples, packing, phases, the tools."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from own_files import llava, picture_row, write_jsonl, write_parquet, write_pictures

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.check import check_run_data
from aki_megatron.data.pipeline import build_data_pipeline, build_sources, build_tokenizer, data_fingerprints
from aki_megatron.data.sample_hash import sample_hash
from aki_megatron.errors import ConfigError
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer

ROOT = Path(__file__).parents[2]
OWN = ROOT / "configs/demo/own.yaml"

SOURCES = [
    {"name": "talk", "format": "llava", "path": "chat.jsonl", "images": "pics", "weight": 2.0},
    {"name": "turns", "format": "llava", "path": "chat.json", "images": "pics", "split_turns": True},
    {"name": "table", "format": "parquet", "path": "data", "augment": "official"},
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    write_pictures(root)
    records: list[Any] = [
        llava("First <image> second <image>?", f"Answer {number}.", "And?", "No.", image=["0.png", f"{number % 5}.png"])
        for number in range(20)
    ]
    records += [llava(f"Text {number}?", "Yes.") for number in range(5)]
    write_jsonl(root / "chat.jsonl", records)
    (root / "chat.json").write_text(json.dumps(records))
    write_parquet(root / "data/0.parquet", [picture_row(number) for number in range(30)], row_group_size=5)
    write_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def root(tmp_path: Path, original: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "data"))


def run_config(root: Path, *flags: str, sources: Any = SOURCES) -> RunConfig:
    arguments = ["--data.root", str(root), "--data.tokenizer", str(root / "tokenizer")]
    arguments += ["--data.sources", json.dumps(sources), "--init.weights", "null", *flags]
    return load_run(arguments, default_config=OWN, prog="", description="")


def fingerprints(config: RunConfig) -> dict[str, Any]:
    return dict(data_fingerprints(config.data, build_tokenizer(config), build_sources(config.data, lambda line: None)))


def test_moved_files_are_the_same_and_changed_ones_are_not(root: Path) -> None:
    before = fingerprints(run_config(root))
    moved = root.parent / "elsewhere"
    root.rename(moved)
    (moved / "chat.jsonl").rename(moved / "renamed.jsonl")
    (moved / "pics").rename(moved / "pictures")
    paths = {"talk": "renamed.jsonl", "turns": "chat.json", "table": "data"}
    sources = [{**source, "path": paths[source["name"]]} for source in SOURCES]
    sources = [{**source, "images": "pictures"} if "images" in source else source for source in sources]
    assert fingerprints(run_config(moved, sources=sources)) == before
    assert set(before["source talk"].parts) == {"file 0", "images"}
    assert set(before["source table"].parts) == {"file 0"}  # its images are in it
    with (moved / "renamed.jsonl").open("a") as file:
        file.write("\n")
    (moved / "pictures/new.webp").write_bytes(b"x")
    after = fingerprints(run_config(moved, sources=sources))
    assert after["source talk"].parts["file 0"] != before["source talk"].parts["file 0"]
    assert after["source talk"].parts["images"] != before["source talk"].parts["images"]
    assert after["source table"] == before["source table"]


PHASES = json.dumps([{"steps": 3, "sources": ["talk", "table"]}, {"steps": 57}])
PACKED = ["--data.packing.enabled", "true", "--data.packing.sequence_length", "256", "--data.packing.buffer_size", "64"]


def hashes(config: RunConfig, start: int, stop: int) -> list[list[int]]:
    """Return the hashes of the samples of some steps, each read by a pipeline of its own as a resumed run does."""
    pipeline = build_data_pipeline(config, build_tokenizer(config), micro_batch_size=config.train.micro_batch_size)
    found = []
    for plan in pipeline.planner.plan_steps(start):
        if plan.step >= stop:
            break
        samples = (
            (number, index, pipeline.planner.phases[microbatch.phase].stream.sample(n).sample)
            for microbatch in plan.microbatches
            for number, numbers in microbatch.sequences
            for index, n in enumerate(numbers)
        )
        found.append([sample_hash(number, index, sample) for number, index, sample in samples])
    return found


def test_a_resumed_run_draws_the_samples_that_it_would_have_drawn(root: Path) -> None:
    config = run_config(
        root, "--data.phases", PHASES, "--train.global_batch_size", "8", "--train.micro_batch_size", "4"
    )
    whole = hashes(config, 0, 6)
    assert len({value for step in whole for value in step}) > 30
    for start in (1, 4):
        assert hashes(config, start, 6) == whole[start:]


def test_own_files_are_packed_as_their_lengths_say(root: Path) -> None:
    config = run_config(root, *PACKED, "--train.global_batch_size", "4", "--train.micro_batch_size", "2")
    pipeline = build_data_pipeline(config, build_tokenizer(config), micro_batch_size=2)
    plan = next(pipeline.planner.plan_steps(0))
    stream = pipeline.planner.phases[0].stream
    for microbatch in plan.microbatches:
        for _, numbers in microbatch.sequences:
            samples = [stream.sample(n).sample for n in numbers]
            assert [stream.length(n) for n in numbers] == [(len(s.token_ids), len(s.media)) for s in samples]
            assert sum(len(sample.token_ids) for sample in samples) <= 256
        batch = pipeline.dataset[microbatch].batch
        assert batch.token_ids.shape == (2, 256)


def test_everything_of_own_files_is_checked(root: Path) -> None:
    (root / "pics/3.png").unlink()
    lines = (root / "chat.jsonl").read_text().splitlines()
    write_jsonl(root / "chat.jsonl", [*lines, "{"])
    write_parquet(root / "data/1.parquet", [picture_row(31), {**picture_row(32), "messages": []}])
    found = {one.name: one for one in check_run_data(run_config(root), max_samples=0, num_workers=0,
                                                     progress=lambda *done: None)}  # fmt: skip
    talk, turns, table = (found[name] for name in ("talk", "turns", "table"))
    assert (talk.num_records, talk.malformed.total, talk.num_missing) == (26, 1, 4)
    assert (turns.num_records, turns.num_missing) == (45, 8)
    assert (table.num_records, table.num_readable, table.faults.total) == (32, 31, 1)
    assert "1.parquet, row 1 (id r32): the messages must be a list" in table.faults.lines()[0]
    for one in found.values():
        assert one.num_readable + one.faults.total + one.malformed.total == one.num_records


def test_a_sample_with_two_bad_images_is_one_bad_sample(root: Path) -> None:
    (root / "pics/0.png").unlink()
    (root / "pics/3.png").write_bytes(b"no picture")
    config = run_config(root, "--validation.interval", "0", sources=SOURCES[:1])
    (talk,) = check_run_data(config, max_samples=0, num_workers=0, progress=lambda *done: None)
    assert (talk.num_records, talk.num_readable, talk.num_missing, talk.faults.total) == (25, 5, 20, 20)


def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"own_tool_{name}", ROOT / f"tools/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flags(root: Path) -> Iterator[list[str]]:
    yield ["--config", str(OWN), "--data.root", str(root), "--data.tokenizer", str(root / "tokenizer")]


@pytest.mark.parametrize("image_count", [0, 2])
def test_show_batch_shows_images_where_they_stand(
    root: Path, flags: list[str], image_count: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record = llava("A <image> b <image>?", "C.", image=["0.png", "1.png"]) if image_count else llava("A b?", "C.")
    write_jsonl(root / "one.jsonl", [record] * 3)
    source = "[{name: one, format: llava, path: one.jsonl, images: pics}]"
    assert load_tool("show_batch").main([*flags, "--data.sources", source, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"{image_count} images of 9 positions" in printed
    assert printed.count("[image 1: 9 positions]") == printed.count("[image 2: 9 positions]") == image_count // 2
    assert len(list((tmp_path / "out").glob("*.png"))) == image_count
    if image_count:
        first, second = printed.index("[image 1: 9"), printed.index("[image 2: 9")
        assert "b" in printed[first:second] and "?" in printed[second:]


def test_evaluate_takes_questions_from_own_files(root: Path, tmp_path: Path) -> None:
    evaluate = load_tool("val_questions")
    saved = run_config(root, "--run.dir", str(tmp_path / "run"))
    text = OWN.read_text().replace("base: sft.yaml", f"base: {ROOT}/configs/demo/sft.yaml")
    file = tmp_path / "config.yaml"
    file.write_text(text.replace("root: data/own", f"root: {root}"))
    source = "{name: asked, format: llava, path: chat.jsonl, images: pics}"
    questions = evaluate.open_questions(saved, file, source)
    assert {name: len(items) for name, items in questions.items()} == {"asked": 25}
    with pytest.raises(ConfigError, match=r"has a val split to evaluate on; name questions of your own with --source"):
        evaluate.open_questions(saved, file, None)
    for wrong, message in (("{name: vsr}", "--source is for files"), ("{name: x, format: lava}", "format must be one")):
        with pytest.raises(ConfigError, match=message):
            evaluate.open_questions(saved, file, wrong)


def test_the_start_lists_what_is_missing(root: Path) -> None:
    from aki_megatron.train.main import missing_inputs

    (root / "chat.jsonl").unlink()
    shutil.rmtree(root / "pics")
    missing = "\n".join(missing_inputs(run_config(root)))
    assert f"{root}/chat.jsonl (data.sources talk)" in missing and f"{root}/pics (data.sources turns)" in missing
