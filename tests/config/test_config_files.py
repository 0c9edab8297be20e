"""Every file under configs/ builds; AKI-4B holds the paper's values; saving changes nothing."""

import json
from pathlib import Path
from typing import get_args

import pytest

from aki_megatron.config.cross_checks import check_world
from aki_megatron.config.data import SourceName
from aki_megatron.config.deepspeed import read_json, settle
from aki_megatron.config.field_info import fields
from aki_megatron.config.load import load_run
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import check_resume, compare_for_resume, dump, load_saved
from aki_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted(ROOT.glob("configs/**/*.yaml"))
JSONS = sorted(ROOT.glob("configs/**/*.json"))


def load(*argv: str, config: Path = ROOT / "configs/demo/sft.yaml") -> RunConfig:
    return load_run(
        ["--config", str(config), *argv], default_config=config, prog="launcher/sft.py", description="Test."
    )


def test_there_are_configs() -> None:
    names = {str(path.relative_to(ROOT / "configs")) for path in [*YAMLS, *JSONS]}
    assert {"aki4b/pretrain.yaml", "aki4b/sft.yaml", "demo/pretrain.yaml", "demo/sft.yaml", "zero3.json"} <= names


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_config_builds_and_survives_saving(path: Path, tmp_path: Path) -> None:
    run = load(config=path)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump(run))
    assert load_saved(saved) == run
    assert dump(load_saved(saved)) == dump(run)
    check_world(run, 8 if "aki4b" in path.parts else 2)


@pytest.mark.parametrize("path", JSONS, ids=lambda p: p.name)
@pytest.mark.parametrize("config", YAMLS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_ds_config_agrees_with_every_run_of_its_stage(path: Path, config: Path) -> None:
    stage = json.loads(path.read_text())["zero_optimization"]["stage"]
    run = load("--ds_config", str(path), "--parallel.zero_stage", str(stage), config=config)
    assert run.parallel.zero_stage == stage == int(path.stem[-1])
    assert settle(read_json(path), run) == (run.deepspeed, [])


PAPER = {  # Table 3; fine-tuning in 8 rows of 2048 places, which hold about the 64 samples of the table
    "pretrain": (192, 1e-4, 1e-5, 2000, 275_000, 1e-2, 1.0, "bf16", 128, "causal", "captions"),
    "sft": (8, 2e-5, 1e-6, 150, 10_000, 1e-4, 1.0, "bf16", 512, "mma", "conversations"),
}


@pytest.mark.parametrize("stage", PAPER)
def test_aki4b_holds_the_values_of_table_3(stage: str) -> None:
    run = load(config=ROOT / f"configs/aki4b/{stage}.yaml")
    o = run.optimizer
    assert PAPER[stage] == (
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
    table = dict.fromkeys(get_args(SourceName), 0.103) | {"vsr": 0.026, "visualgenome": 0.047}
    assert {source.name: source.weight for source in run.data.sources} == table
    assert sum(table.values()) == pytest.approx(1.0)


def test_aki4b_pretrains_on_kale_then_on_ocr() -> None:
    phases = load(config=ROOT / "configs/aki4b/pretrain.yaml").data.phases
    assert [(phase.steps, phase.sources) for phase in phases] == [(250_000, ("kale",)), (25_000, ("ocr",))]


def test_the_default_run_needs_no_arguments() -> None:
    config = ROOT / "configs/aki4b/sft.yaml"
    run = load_run([], default_config=config, prog="launcher/sft.py", description="Test.")
    assert run == load(config=config)


def test_every_key_beyond_sizes_has_a_help_text() -> None:
    bare = [key for key, info in fields(RunConfig) if not info.description and not key.startswith("model.")]
    assert bare == []


def test_a_run_goes_on_with_other_ranks_and_logs() -> None:
    before = load()
    after = load(
        *(
            "--parallel.zero_stage",
            "1",
            "--log.interval",
            "1",
            "--checkpoint.interval",
            "7",
            "--train.micro_batch_size",
            "8",
        ),
        *("--run.dir", "elsewhere", "--data.prefetch_steps", "4", "--watch.on_loss_spike", "rollback"),
    )
    assert compare_for_resume(before, after) == []


def test_a_run_does_not_go_on_as_another_one(tmp_path: Path) -> None:
    before, after = load(), load("--train.seed", "9", "--optimizer.lr", "1e-3", "--model.decoder.num_layers", "5")
    differences = compare_for_resume(before, after)
    assert [text.split(" was ")[0] for text in differences] == [
        "model.decoder.num_layers",
        "train.seed",
        "optimizer.lr",
    ]
    assert "train.seed was 2 when the run started and is 9 now" in differences
    saved = tmp_path / "config.yaml"
    check_resume(saved, after)
    saved.write_text(dump(before))
    check_resume(saved, before)
    with pytest.raises(ConfigError, match=r"holds another run: 3 problems(.|\n)*train\.seed(.|\n)*--run\.dir"):
        check_resume(saved, after)
