"""What a run reads follows from its configuration: weights of the sources, phases, seeds."""

import io
from collections import Counter
from pathlib import Path

import pytest
from data_files import pairs, write_sources, write_tar
from PIL import Image

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.pipeline import build_sources, build_stream, phase_seed, run_phases, source_weights
from aki_megatron.data.sample_stream import Source
from aki_megatron.errors import DataError
from aki_megatron.train.main import missing_inputs

ROOT = Path(__file__).resolve().parents[2]


def demo(*flags: str) -> RunConfig:
    config = ROOT / "configs/demo/sft.yaml"
    return load_run(["--config", str(config), *flags], default_config=config, prog="sft.py", description="")


SIZES = {"vqav2": 40, "vsr": 10, "aokvqa": 20, "refcoco": 30}


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("weights", {"vqav2": 0.65, "vsr": 0.05, "aokvqa": 0.05, "refcoco": 0.25}),
        ("uniform", dict.fromkeys(SIZES, 1.0)),
        ("proportional", {name: float(size) for name, size in SIZES.items()}),
    ],
)
def test_every_way_of_mixing(mixing: str, expected: dict[str, float]) -> None:
    sources = {name: Source(range(size)) for name, size in SIZES.items()}
    assert source_weights(demo("--data.mixing", mixing).data, sources) == expected


def test_a_run_without_phases_is_one() -> None:
    (only,) = run_phases(demo())
    assert (only.steps, only.sources, only.order) == (1600, (), "image_first")


DUAL = "{{steps: {}, order: text_first}}, {{steps: {}}}"


def test_dual_order_and_its_variants_are_phases() -> None:
    """Text-first then image-first in one run, or one of the two orders alone: the papers' DOT and its ablations."""
    causal = ("--attention.rule", "causal")
    tandem = run_phases(demo(*causal, "--data.phases", f"[{DUAL.format(800, 800)}]"))
    assert [(phase.order, phase.steps) for phase in tandem] == [("text_first", 800), ("image_first", 800)]
    alone = run_phases(demo(*causal, "--data.phases", "[{steps: 1600, order: text_first}]"))
    assert [phase.order for phase in alone] == ["text_first"]


def test_every_phase_has_its_own_seed_and_the_first_has_the_runs() -> None:
    seeds = Counter(phase_seed(seed, phase) for seed in (0, 1) for phase in range(3))
    assert max(seeds.values()) == 1 and phase_seed(7, 0) == 7


def keys(config: RunConfig, tokenizer, phase: int, count: int) -> list[str]:
    stream = build_stream(config, tokenizer, build_sources(config.data, print), phase)
    return [sample.key for n in range(count) if (sample := stream.sample(n).sample) is not None]


def test_a_later_phase_goes_on_with_a_source_where_the_earlier_one_stopped(tmp_path: Path, tokenizer) -> None:
    write_sources(tmp_path, count=20)
    flags = ["--data.root", str(tmp_path), "--data.sources", "[{name: vqav2}, {name: vsr}]", "--data.mixing", "uniform"]
    flags += ["--train.global_batch_size", "4", "--train.micro_batch_size", "4", "--train.steps", "8"]
    flags += ["--optimizer.warmup_steps", "1", "--data.max_text_tokens", "500"]
    one = demo(*flags)
    phases = "[{steps: 3, sources: [vqav2]}, {steps: 2, sources: [vqav2]}, {steps: 3, sources: [vsr]}]"
    several = demo(*flags, "--data.phases", phases)
    first, second = keys(several, tokenizer, 0, 12), keys(several, tokenizer, 1, 8)
    assert len({*first, *second}) == 20  # every item once, over both phases
    whole = demo(*flags, "--data.phases", "[{steps: 8, sources: [vqav2]}]")
    assert first + second == keys(whole, tokenizer, 0, 20)
    assert len(set(keys(several, tokenizer, 2, 20))) == 20  # a source that no phase read before begins anew
    mixed = demo(*flags, "--data.phases", "[{steps: 5}, {steps: 3}]")
    assert keys(mixed, tokenizer, 0, 20) == keys(one, tokenizer, 0, 20)
    both = keys(mixed, tokenizer, 0, 20) + keys(mixed, tokenizer, 1, 20)
    for name in ("vqav2", "vsr"):
        visits = [key for key in both if key.startswith(name)]
        assert len(set(visits)) == min(20, len(visits))


def test_packed_phases_begin_anew(tmp_path: Path, tokenizer) -> None:
    write_sources(tmp_path, count=20)
    flags = ["--data.root", str(tmp_path), "--data.sources", "[{name: vqav2}]", "--data.packing.enabled", "true"]
    flags += ["--data.phases", "[{steps: 3}, {steps: 1597}]"]
    assert keys(demo(*flags), tokenizer, 1, 20) != keys(demo(*flags), tokenizer, 0, 20)
    assert len(set(keys(demo(*flags), tokenizer, 1, 20))) == 20


def test_later_phases_of_captions_go_on_too(tmp_path: Path, tokenizer) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"{shard:05}.tar", pairs(5, first=5 * shard))
    captions = "[{name: c, shards: ['{00000..00003}.tar']}]"
    config = ROOT / "configs/demo/pretrain.yaml"
    flags = ["--config", str(config), "--data.root", str(tmp_path), "--data.captions", captions, "--train.steps", "5"]
    flags += ["--train.global_batch_size", "4", "--train.micro_batch_size", "4", "--optimizer.warmup_steps", "1"]
    flags += ["--data.phases", "[{steps: 2}, {steps: 3}]"]
    run = load_run(flags, default_config=config, prog="pretrain.py", description="")
    assert len({*keys(run, tokenizer, 0, 8), *keys(run, tokenizer, 1, 12)}) == 20


def transparent_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (36, 36), (0, 0, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("transparency", "pixel"), [("ignore", 0), ("white", 255)])
def test_the_image_options_of_a_run_reach_its_pixels(transparency: str, pixel: int, tmp_path: Path, tokenizer) -> None:
    write_sources(tmp_path)
    for image in (tmp_path / "VQA/train2014").iterdir():
        image.write_bytes(transparent_png())
    flags = "--data.root", str(tmp_path), "--data.sources", "[{name: vqav2}]"
    config = demo(*flags, "--data.images.transparency", transparency)
    sample = build_stream(config, tokenizer, build_sources(config.data, print), 0).sample(0).sample
    assert sample is not None and sample.images and set(sample.images[0].rgb) == {pixel}


def test_a_bad_sample_of_a_run_names_its_annotation_files(tmp_path: Path, tokenizer) -> None:
    write_sources(tmp_path)
    flags = "--data.root", str(tmp_path), "--data.sources", "[{name: vqav2}]"
    config = demo(*flags)
    source = build_sources(config.data, print)["vqav2"]
    assert source.locate is not None
    questions, annotations = sorted((tmp_path / "VQA").glob("*.json"))
    assert source.locate(0) == f"{questions} and {annotations}, sample {source.items[0].key}"


def test_missing_tars_are_left_out_of_a_run_that_says_so(tmp_path: Path) -> None:
    write_tar(tmp_path / "00001.tar", pairs(3))

    def run(skip_missing: str) -> RunConfig:
        captions = f"[{{name: c, shards: ['{{00000..00002}}.tar'], skip_missing: {skip_missing}}}]"
        config = ROOT / "configs/demo/pretrain.yaml"
        flags = ["--config", str(config), "--data.root", str(tmp_path), "--data.captions", captions]
        return load_run(flags, default_config=config, prog="pretrain.py", description="")

    def missing(config: RunConfig) -> list[str]:
        return [line for line in missing_inputs(config) if ".tar" in line]

    assert len(missing(run("false"))) == 2 and not missing(run("true"))
    with pytest.raises(DataError, match=r"(?s)00000\.tar.*skip_missing: true"):
        build_sources(run("false").data, print)
    lines: list[str] = []
    (source,) = build_sources(run("true").data, lines.append).values()
    assert len(source.items) == 3 and lines[0].startswith("2 of the 3 tars") and source.locate is not None
    assert source.locate(1) == f"Tar {tmp_path / '00001.tar'}, key 000001"
