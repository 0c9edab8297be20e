"""tools/make_data.py check: everything that a run would read is decoded once and counted."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import image_bytes, pairs, write_tar

from aki_megatron.config.load import load_run
from aki_megatron.data.check import MISSING_IMAGE, SourceCheck, check_run_data
from aki_megatron.data.check_report import histogram_lines, report_lines
from aki_megatron.data.release_counts import RELEASE_COUNTS
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset

ROOT = Path(__file__).parents[2]
SFT, PRETRAIN = ROOT / "configs/demo/sft.yaml", ROOT / "configs/demo/pretrain.yaml"
Check = Callable[..., dict[str, SourceCheck]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    write_dataset(data, DatasetSize(40, 10, 3), lambda done: None)
    return data


@pytest.fixture
def check(root: Path) -> Check:
    """Check some sources of the root; ``config`` and overrides as for a launcher."""

    def run(
        config: Path, sources: list[dict[str, object]], *, samples: int = 0, workers: int = 1
    ) -> dict[str, SourceCheck]:
        key = "captions" if config == PRETRAIN else "sources"
        flags = [f"--data.{key}", json.dumps(sources), "--data.root", str(root)]
        flags += ["--data.tokenizer", str(root / "tokenizer")]
        loaded = load_run(flags, default_config=config, prog="", description="")
        found = check_run_data(loaded, max_samples=samples, num_workers=workers, progress=lambda *done: None)
        return {source.name: source for source in found}

    return run


def damage(root: Path) -> None:
    """Make one picture missing, another torn, one record malformed, and one text special."""
    (root / "A-OKVQA/train2017/000000000001.jpg").unlink()
    torn = next(iter(sorted((root / "A-OKVQA/train2017").iterdir())))
    torn.write_bytes(torn.read_bytes()[:200])
    annotations = root / "A-OKVQA/aokvqa_v1p0_train.json"
    content = json.loads(annotations.read_text())
    content[0].pop("choices")
    content[-1]["question"] = "What is <image>?"
    annotations.write_text(json.dumps(content))


def test_the_sources_of_the_validation_are_checked_too(root: Path) -> None:
    flags = ["--data.root", str(root), "--data.tokenizer", str(root / "tokenizer"), "--validation.interval", "5"]
    flags += ["--data.sources", "[{name: vsr}]", "--validation.sources", "[{name: vqav2}, {name: visualgenome}]"]
    config = load_run(flags, default_config=SFT, prog="", description="")
    checked = check_run_data(config, max_samples=0, num_workers=1, progress=lambda *done: None)
    vsr, vqav2, visualgenome = checked
    assert (vsr.name, vqav2.name) == ("vsr", "vqav2 (validation)")
    assert vqav2.num_records == vqav2.num_readable > 0 and all("val" in image for image in vqav2.image_uses)
    assert "no split 'val'" in visualgenome.cannot_open
    assert all(list(report_lines(found, config.data)) for found in (vsr, vqav2, visualgenome))


def test_good_data_has_no_faults(check: Check) -> None:
    for found in check(SFT, [{"name": name} for name in ("vqav2", "scienceqa", "visualgenome", "llava150k")]).values():
        assert found.num_records == found.num_checked == found.num_readable == found.token_counts.total() > 0
        assert not found.faults.total and not found.malformed.total and not found.is_refused(0.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_faults_are_counted_by_kind_with_the_first_of_each(
    check: Check, root: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aki_megatron.data.check._CHUNK", 4)
    damage(root)
    found = check(SFT, [{"name": "aokvqa"}], workers=workers)["aokvqa"]
    good = check(SFT, [{"name": "vsr"}])["vsr"]
    assert found.malformed.total == 1 and "the field 'choices' is missing" in found.malformed.lines()[0]
    assert found.num_missing == found.faults.counts[MISSING_IMAGE] > 0
    messages = "\n".join(found.faults.first.values())
    assert "000000000001.jpg of sample aokvqa/choice/" in messages and "is not a readable" in messages
    assert "contains the special token <image> literally" in messages
    assert len(found.faults.counts) == 3
    assert found.num_readable + found.faults.total + found.malformed.total == found.num_records
    assert found.num_readable < found.num_records and good.num_missing > 0
    assert found.is_refused(0.0) and not found.is_refused(0.5)


def test_a_part_of_the_samples_is_spread_evenly(check: Check) -> None:
    found = check(SFT, [{"name": "refcoco"}], samples=10)["refcoco"]
    assert found.num_checked == found.num_readable == 10 < found.num_records


def test_captions_are_decoded_from_their_tars(check: Check, root: Path) -> None:
    members = pairs(6)
    members[2] = (members[2][0], image_bytes(1)[:100])
    write_tar(root / "mine/00000.tar", members)
    sources = [{"name": "mine", "shards": ["mine/00000.tar"]}, {"name": "none", "shards": ["mine/{0..3}.tar"]}]
    found = check(PRETRAIN, sources)
    assert found["mine"].num_readable == 5 and found["mine"].faults.total == 1
    assert "mine/00000/000001" in found["mine"].faults.lines()[0]
    assert "do not exist" in found["none"].cannot_open and found["none"].is_refused(1.0)


def test_damaged_tars_are_named_and_their_samples_counted(check: Check, root: Path) -> None:
    whole = write_tar(root / "mine/00000.tar", pairs(20)).read_bytes()
    (root / "mine/00001.tar").write_bytes(whole[: 7 * 2560])
    (root / "mine/00002.tar").write_bytes(gzip.compress(whole))
    found = check(PRETRAIN, [{"name": "mine", "shards": ["mine/{00000..00002}.tar"]}])["mine"]
    assert (found.num_records, found.num_readable, found.faults.total) == (29, 27, 2)
    lines = "\n".join(report_lines(found, load_run([], default_config=PRETRAIN, prog="", description="").data))
    assert f"{root}/mine/00001.tar: 7 of at least 8 samples readable" in lines
    assert f"{root}/mine/00002.tar: no sample readable, of an unknown number. the file is no tar but gzip" in lines


def test_lengths_and_samples_over_the_cap(check: Check, root: Path) -> None:
    members = [("0.jpg", image_bytes(1)), ("0.txt", b"red cat " * 200), *pairs(2, first=1)]
    write_tar(root / "mine/00000.tar", members)
    found = check(PRETRAIN, [{"name": "mine", "shards": ["mine/00000.tar"]}])["mine"]
    assert found.num_over_cap == 1 and max(found.token_counts) > 128 and found.token_counts.total() == 3
    lines = list(histogram_lines(found.token_counts))
    assert sum(int(line.split()[3].replace(",", "")) for line in lines) == 3 and "#" in lines[-1]


def test_the_command_prints_a_report_and_returns_whether_a_run_would_stop(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import make_data
    finally:
        sys.path.pop(0)
    flags = ["check", "--config", str(SFT), "--data.root", str(root), "--data.tokenizer", str(root / "tokenizer")]
    flags += ["--workers", "1"]
    assert make_data.main(flags) == 0
    printed = capsys.readouterr().out
    assert "(release: 443,757)" in printed and "A run can read all of it." in printed and "text tokens" in printed
    damage(root)
    assert make_data.main([*flags, "--data.max_bad_fraction", "0"]) == 1
    printed = capsys.readouterr().out
    assert "malformed records: 1" in printed and "A RUN WOULD STOP" in printed
    assert make_data.main([*flags, "--samples", "-1"]) == 2
    assert "--samples -1" in capsys.readouterr().err


def test_a_source_that_cannot_be_opened_is_reported_with_the_others(check: Check, root: Path) -> None:
    (root / "vsr/train-random.jsonl").unlink()
    found = check(SFT, [{"name": "vsr"}, {"name": "gqa"}])
    assert "train-random.jsonl" in found["vsr"].cannot_open and found["gqa"].num_readable > 0
    config = load_run([], default_config=SFT, prog="", description="").data
    assert list(report_lines(found["vsr"], config))[0].startswith("vsr: CANNOT BE READ: ")


def test_release_counts_are_of_registered_datasets() -> None:
    from aki_megatron.config.datasets import DATASETS

    assert set(RELEASE_COUNTS) <= set(DATASETS)
