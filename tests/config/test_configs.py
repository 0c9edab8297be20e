"""Every run under configs/ builds and holds the values of its written-out form; AKI-4B holds the paper's values."""

import json
from pathlib import Path

import pytest
from demo_runs import ROOT, load

from aki_megatron.config.batch_sizes import check_world
from aki_megatron.config.deepspeed import read_json, resolve_settings
from aki_megatron.config.field_info import fields
from aki_megatron.config.load import load_run
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump_run, load_saved
from aki_megatron.config.yaml_file import read_yaml

BASES = sorted(ROOT.glob("configs/**/model.yaml"))
"""Files that are no runs but the base of some."""
YAMLS = sorted(set(ROOT.glob("configs/**/*.yaml")) - set(BASES))
WRITTEN_OUT = Path(__file__).with_name("written_out")
JSONS = sorted(ROOT.glob("configs/**/*.json"))


def test_there_are_configs() -> None:
    names = {str(path.relative_to(ROOT / "configs")) for path in [*YAMLS, *JSONS]}
    assert {"aki4b/pretrain.yaml", "aki4b/sft.yaml", "demo/pretrain.yaml", "demo/sft.yaml", "zero3.json"} <= names


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_builds_and_survives_saving(path: Path, tmp_path: Path) -> None:
    run = load(config=path)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(run))
    assert load_saved(saved) == run
    assert dump_run(load_saved(saved)) == dump_run(run)
    check_world(run, 8 if "aki4b" in path.parts else 2)


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_is_its_written_out_form(path: Path) -> None:
    """The forms are the files of before `base:`; a change of a value that is meant changes both."""
    form = WRITTEN_OUT / f"{path.parent.name}_{path.name}"
    assert "base" not in read_yaml(form).values
    assert load(config=path) == load(config=form)


def test_every_base_is_the_base_of_a_run() -> None:
    assert {(path.parent / read_yaml(path).values.get("base", "none")).resolve() for path in YAMLS} >= set(BASES)
    assert len(list(WRITTEN_OUT.iterdir())) == len(YAMLS)


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.name)
@pytest.mark.parametrize("config", YAMLS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_ds_config_agrees_with_every_run_of_its_zero_stage(path: Path, config: Path) -> None:
    zero_stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    run = load("--ds_config", str(path), "--parallel.zero_stage", str(zero_stage), config=config)
    assert run.parallel.zero_stage == zero_stage == int(path.stem[-1])
    assert resolve_settings(read_json(path), run) == (run.deepspeed, [])


PAPER = {  # Table 3; fine-tuning in 8 sequences of 2048 positions, which hold about the 64 samples of the table
    "pretrain": (192, 1e-4, 1e-5, 2000, 275_000, 1e-2, 1.0, "bf16", 128, "causal", "captions"),
    "sft": (8, 2e-5, 1e-6, 150, 10_000, 1e-4, 1.0, "bf16", 512, "mma", "conversations"),
}


@pytest.mark.parametrize("name", PAPER)
def test_aki4b_holds_the_values_of_table_3(name: str) -> None:
    run = load(config=ROOT / f"configs/aki4b/{name}.yaml")
    o = run.optimizer
    assert PAPER[name] == (
        *(
            run.train.global_batch_size,
            o.lr,
            o.min_lr,
            o.warmup_steps,
            run.train.steps,
            o.weight_decay,
            o.max_grad_norm,
        ),
        *(run.train.precision, run.data.max_text_tokens, run.attention.rule, run.data.kind),
    )
    assert (o.beta1, o.beta2, o.eps) == (0.9, 0.999, 1e-8)
    assert run.model == ModelConfig()
    assert run.model.resampler.num_latents == 144
    assert run.model.decoder.rope.rope_type == "longrope"


def test_aki4b_mixes_its_sources_as_table_4_does() -> None:
    run = load(config=ROOT / "configs/aki4b/sft.yaml")
    equal = ("vqav2", "gqa", "ocrvqa", "aokvqa", "scienceqa", "refcoco", "refcoco+", "refcocog", "llava150k")
    table = dict.fromkeys(equal, 0.103) | {"vsr": 0.026, "visualgenome": 0.047}
    assert {source.name: source.weight for source in run.data.sources} == table
    assert sum(table.values()) == pytest.approx(1.0)


def test_aki4b_pretrains_on_kale_then_on_ocr() -> None:
    phases = load(config=ROOT / "configs/aki4b/pretrain.yaml").data.phases
    assert [(phase.steps, phase.sources) for phase in phases] == [(250_000, ("kale",)), (25_000, ("ocr",))]


def test_the_default_run_needs_no_arguments() -> None:
    config = ROOT / "configs/aki4b/sft.yaml"
    run = load_run([], default_config=config, prog="launcher/sft.py", description="Test.")
    assert run == load(config=config)


def test_every_key_has_a_help_text() -> None:
    assert [key for key, info in fields(RunConfig) if not info.description] == []
