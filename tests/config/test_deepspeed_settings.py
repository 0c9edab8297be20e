"""DeepSpeed's JSON beside the run: "auto", agreement, contradictions that name both, names DeepSpeed does not know."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from aki_megatron.config.batch_sizes import check_world
from aki_megatron.config.deepspeed import offload_device, resolve_settings, settings_for_engine
from aki_megatron.config.deepspeed_keys import ALIASES, KNOWN, ONLY, OWNED, PROVEN, REFUSED, REMOVED, SPECIAL
from aki_megatron.config.load import load_run
from aki_megatron.config.nested import set_dotted
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump_run, load_saved
from aki_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SFT = ROOT / "configs/demo/sft.yaml"


def load(tmp_path: Path, settings: dict[str, Any] | str, *argv: str) -> RunConfig:
    file = tmp_path / "ds.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return load_run(
        ["--config", str(SFT), "--ds_config", str(file), *argv], default_config=SFT, prog="sft.py", description="A."
    )


CONTRADICTIONS: list[tuple[dict[str, Any] | str, list[str]]] = [
    (
        {"zero_optimization": {"stage": 1}},
        ["zero_optimization.stage=1 but parallel.zero_stage=3", "--parallel.zero_stage 1"],
    ),
    (
        {"train_batch_size": 32},
        ["train_batch_size=32 but train.global_batch_size=64", '"auto"', "--train.global_batch_size 32"],
    ),
    ({"train_micro_batch_size_per_gpu": 4}, ["train_micro_batch_size_per_gpu=4 but train.micro_batch_size=32"]),
    (
        {"gradient_clipping": 0.5},
        ["gradient_clipping=0.5 but optimizer.max_grad_norm=1.0", "--optimizer.max_grad_norm 0.5"],
    ),
    ({"gradient_clipping": True}, ["gradient_clipping=true but optimizer.max_grad_norm=1.0"]),
    ({"bf16": {"enabled": True}}, ["bf16.enabled=true but train.precision=fp32", "--train.precision bf16"]),
    ({"fp16": {"enabled": True}}, ["fp16.enabled=true", "train.precision is bf16 or fp32"]),
    ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled=true", "train.precision"]),
    ({"optimizer": {"type": "Adam"}}, ['optimizer.type="Adam"', "AdamW"]),
    (
        {"optimizer": {"params": {"lr": 1e-5}}},
        ["optimizer.params.lr=1e-05 but optimizer.lr=", "--optimizer.lr 1e-05"],
    ),
    ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, ["betas=[0.9, 0.99] but optimizer.beta1=0.9", "beta2=0.98"]),
    ({"optimizer": {"params": {"torch_adam": True}}}, ["optimizer.params.torch_adam=true", "optimizer.*"]),
    ({"scheduler": {"type": "WarmupLR"}}, ['scheduler.type="WarmupLR"', "optimizer.lr, min_lr, warmup_steps"]),
    ({"pipeline": {"stages": 2}}, ["pipeline.stages=2", "parallel.pipeline"]),
    ({"tensorboard": {"enabled": True}}, ["tensorboard.enabled=true", "log.tensorboard"]),
    ({"steps_per_print": 7}, ["steps_per_print=7 but log.interval=20", "--log.interval 7"]),
    ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps must be", "got 0"]),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, ['data_types.grad_accum_dtype="bf16"', "fp32"]),
    ({"zero_optimisation": {"stage": 3}}, ["zero_optimisation is no setting", "did you mean zero_optimization?"]),
    ({"zero_optimization": {"stag": 3}}, ["zero_optimization.stag", "did you mean zero_optimization.stage?"]),
    (
        {"zero_optimization": {"offload_optimizer": "cpu"}},
        ["zero_optimization.offload_optimizer must be a mapping", 'got "cpu"'],
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "disk"}}},
        ["zero_optimization.offload_optimizer.device", '"cpu" or "none"', 'got "disk"'],
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": 1}}},
        ["offload_optimizer.pin_memory must be true or false, got 1"],
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memmory": True}}},
        ["did you mean zero_optimization.offload_optimizer.pin_memory?"],
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        ["zero_optimization.offload_optimizer.ratio=0.5", "the whole optimizer state"],
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
        ['zero_optimization.offload_optimizer.nvme_path="/x"', "NVMe", "not supported"],
    ),
    ({"zero_optimization": True}, ["zero_optimization must be a mapping", "got true"]),
    ({"amp": {"enabled": True}}, ["amp was removed from DeepSpeed"]),
    ({"bf16": {"enabled": True}, "train_batch_size": 1}, ["2 problems", "bf16.enabled", "train_batch_size"]),
    ('{"a": 1,}', ["this is not JSON: line 1, column"]),
    ('{"bf16": {}, "bf16": {}}', ["the key bf16 is there twice"]),
    ("[]", ["a JSON object, got []"]),
]


@pytest.mark.parametrize(("settings", "expected"), CONTRADICTIONS, ids=[str(s) for s, _ in CONTRADICTIONS])
def test_contradictions(tmp_path: Path, settings: dict[str, Any] | str, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, settings)
    for part in [str(tmp_path / "ds.json"), *expected]:
        assert part in str(caught.value), str(caught.value)


def test_a_missing_ds_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.json: there is no such file .*configs/zero3\.json"):
        load_run(["--ds_config", str(tmp_path / "no.json")], default_config=SFT, prog="sft.py", description="A.")


def test_auto_agreement_and_silence_leave_nothing_behind(tmp_path: Path) -> None:
    settings = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1,
        "bf16": {"enabled": False},
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01},
        },
        "scheduler": {"type": "auto", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "wandb": {"enabled": False, "project": "x"},
        "gradient_accumulation_steps": "auto",
        "steps_per_print": 20,
    }
    assert load(tmp_path, settings).deepspeed == {}
    assert load(tmp_path, {}).deepspeed == {}


def test_the_rest_passes_through_and_is_saved_with_the_run(tmp_path: Path) -> None:
    rest = {
        "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
    }
    run = load(tmp_path, rest | {"train_batch_size": "auto"})
    assert run.deepspeed == rest == settings_for_engine(run)
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(run))
    assert load_saved(saved) == run


def test_the_run_wins_its_own_names_in_the_saved_section_too(tmp_path: Path) -> None:
    run = load(tmp_path, {"wall_clock_breakdown": True})
    saved = tmp_path / "config.yaml"
    saved.write_text(
        dump_run(run).replace("deepspeed: {wall_clock_breakdown: true}", "deepspeed: {train_batch_size: 64}")
    )
    with pytest.raises(ConfigError, match="deepspeed holds train_batch_size, which the run decides"):
        load_saved(saved)


@pytest.mark.parametrize("block", [{"device": "nvme"}, {"device": "cpu"}])
def test_offloading_that_the_table_refuses(tmp_path: Path, block: dict[str, Any]) -> None:
    what = "offload_optimizer" if block["device"] == "nvme" else "offload_param"
    with pytest.raises(ConfigError, match=rf"zero_optimization\.{what}\.device={block['device']}: "):
        load(tmp_path, {"zero_optimization": {what: block}})


def test_offloading_switched_off_or_left_out(tmp_path: Path) -> None:
    assert load(tmp_path, {"zero_optimization": {"offload_optimizer": None, "offload_param": {}}}).deepspeed == {}
    off = {"zero_optimization": {"offload_optimizer": {"device": "none"}, "offload_param": {"device": "none"}}}
    assert load(tmp_path, off, "--parallel.zero_stage", "1").deepspeed == off
    usual = {"device": "cpu", "pin_memory": "auto", "ratio": 1.0, "fast_init": False, "pipeline_read": False}
    run = load(tmp_path, {"zero_optimization": {"offload_optimizer": usual}})
    assert run.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}


def test_settings_have_no_effect_without_deepspeed(tmp_path: Path) -> None:
    plain = ("--parallel.zero_stage", "0")
    assert load(tmp_path, {"zero_optimization": {"stage": "auto"}, "gradient_clipping": 1.0}, *plain).deepspeed == {}
    load(tmp_path, {"gradient_accumulation_steps": 2}, *plain)
    with pytest.raises(ConfigError, match=r"deepspeed holds wall_clock_breakdown, but parallel\.zero_stage=0"):
        load(tmp_path, {"wall_clock_breakdown": True}, *plain)


def test_overrides_are_compared_too(tmp_path: Path) -> None:
    run = load(tmp_path, {"zero_optimization": {"stage": 1}}, "--parallel.zero_stage", "1")
    assert run.parallel.zero_stage == 1


def test_accumulation_is_compared_once_the_ranks_are_known(tmp_path: Path) -> None:
    run = load(tmp_path, {"gradient_accumulation_steps": 2})
    check_world(run, 1)
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps=2 but train\.global_batch_size=64 .* = 1"):
        check_world(run, 2)
    assert settings_for_engine(run) == {}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"round_robin_gradients": True}}, "scrambled weights"),
    ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "second partition"),
    ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "changes the result"),
    ({"zero_optimization": {"legacy_stage1": True}}, "no longer has it"),
    ({"zero_optimization": {"zero_quantized_weights": True}}, "quantized"),
    ({"zero_optimization": {"zero_quantized_nontrainable_weights": True}}, "quantized"),
    ({"zero_optimization": {"zero_quantized_gradients": True}}, "quantized"),
    ({"zero_optimization": {"enable_sanity_checks": True}}, "all ranks of the world"),
    ({"zero_optimization": {"parameter_alignment": True}}, "no test proves it"),
    ({"zero_optimization": {"cpu_offload": True}}, 'offload_optimizer": {"device": "cpu"}'),
    ({"zero_optimization": {"stage3_gather_fp16_weights_on_model_save": True}}, "gather_16bit_weights_on_model_save"),
    ({"zero_optimization": {"mics_shard_size": 2}}, "zero_optimization.mics_shard_size was removed from DeepSpeed"),
    ({"gradient_predivide_factor": 2.0}, "ZeRO 2 and 3 do not support"),
    ({"prescale_gradients": True}, "ZeRO 2 and 3 do not support"),
    ({"communication_data_type": "bf16"}, "three times the error"),
    ({"data_types": {"param_dtype": "bf16"}}, "no test proves it"),
    ({"comms_logger": {"enabled": True, "verbose": True}}, "no test proves it"),
    ({"timers": {"throughput": {"enabled": False}}}, "delete the block"),
    ({"aio": {"block_size": 1048576}}, "NVMe"),
    ({"compile": {"offload_activation": True}}, "no test proves it"),
]


@pytest.fixture(scope="module")
def runs() -> list[RunConfig]:
    """A run of each ZeRO stage."""
    argv = ["--config", str(SFT), "--parallel.zero_stage"]
    return [load_run([*argv, stage], default_config=SFT, prog="sft.py", description="A.") for stage in "123"]


def problem(settings: dict[str, Any], run: RunConfig) -> str:
    """The one sentence about settings with which a run is refused."""
    _, problems = resolve_settings(settings, run)
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(("settings", "expected"), REFUSALS, ids=[str(s) for s, _ in REFUSALS])
def test_what_is_not_proven_is_refused_with_the_reason(
    settings: dict[str, Any], expected: str, runs: list[RunConfig]
) -> None:
    for run in runs:
        assert expected in problem(settings, run)


@pytest.mark.parametrize("name", [*PROVEN, *ONLY, "bf16.enabled", "zero_optimization.offload_param.pin_memory"])
def test_values_of_the_wrong_type(name: str, runs: list[RunConfig]) -> None:
    wrong: list[Any] = ["yes", -1, 2.5, [1], None, float("inf")]
    only = ONLY[name][0] if name in ONLY else ""
    if isinstance(only, bool | int | float):  # a number is no switch, and a switch is no number
        wrong.append(int(only) if isinstance(only, bool) else bool(only))
    for value in wrong:
        settings: dict[str, Any] = {}
        set_dotted(settings, name, value)
        assert name in problem(settings, runs[2]), value


def test_whole_numbers_may_be_written_as_deepspeeds_examples_write_them(tmp_path: Path) -> None:
    zero = '{"zero_optimization": {"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 1e9}}'
    passed = load(tmp_path, zero).deepspeed["zero_optimization"]
    assert passed == {"reduce_bucket_size": 500_000_000, "stage3_max_live_parameters": 10**9}
    assert all(isinstance(value, int) for value in passed.values())
    for wrong in ('{"allgather_bucket_size": 3}', '{"reduce_bucket_size": 0}', '{"reduce_bucket_size": 1e11}'):
        with pytest.raises(ConfigError, match="whole number >= "):
            load(tmp_path, f'{{"zero_optimization": {wrong}}}')


def test_both_spellings_of_one_setting(tmp_path: Path) -> None:
    both = {"max_live_parameters": 1, "stage3_max_live_parameters": 2}
    with pytest.raises(ConfigError, match="are one setting; keep one of them"):
        load(tmp_path, {"zero_optimization": both})


def test_only_what_is_proven_in_the_zero_stage_reaches_deepspeed(tmp_path: Path) -> None:
    zero = {"sub_group_size": 1000, "allgather_bucket_size": 2, "reduce_bucket_size": 7}
    for zero_stage, expected in (("1", {"allgather_bucket_size", "reduce_bucket_size"}),
                                 ("3", {"sub_group_size", "reduce_bucket_size"})):  # fmt: skip
        run = load(tmp_path, {"zero_optimization": zero}, "--parallel.zero_stage", zero_stage)
        assert run.deepspeed == {"zero_optimization": zero}
        assert set(settings_for_engine(run)["zero_optimization"]) == expected


def test_nested_values_without_end(tmp_path: Path) -> None:
    for depth in (50, 100_000):
        with pytest.raises(ConfigError, match=r"ds\.json: its values are nested") as caught:
            load(tmp_path, '{"zero_optimization": ' + "[" * depth + "]" * depth + "}")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"ds\.json: holds a value that cannot be read"):
        load(tmp_path, '{"train_batch_size": ' + "1" * 5000 + "}")


def test_the_tables_hold_together() -> None:
    tables = [set(OWNED), set(PROVEN), set(ONLY), set(REFUSED) - {"optimizer"}, set(SPECIAL)]
    assert sum(len(table) for table in tables) == len(KNOWN - {"optimizer"})
    assert not KNOWN & REMOVED
    assert {*ALIASES, *ALIASES.values()} <= KNOWN
    for name, proven in PROVEN.items():
        assert proven.tested and all(proven.values.contains(value) for value in proven.tested), name
        assert (ROOT / proven.proof).parent.is_dir(), name


def test_the_tables_are_those_of_the_installed_deepspeed() -> None:
    config = pytest.importorskip("deepspeed.runtime.config")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names: set[str] = set()
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        names |= {name} | ({field.alias} if field.alias else set())
    blocks = {"offload_optimizer", "offload_param"}
    for block in blocks:
        annotation = DeepSpeedZeroConfig.model_fields[block].annotation
        (model,) = (part for part in get_args(annotation) if part is not type(None))
        names |= {f"{block}.{name}" for name in model.model_fields}
    ours = {name.partition(".")[2] for name in KNOWN if name.startswith("zero_optimization.")}
    assert ours == names - blocks
    removed = {*config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    assert removed | {f"zero_optimization.{name}" for name in config._REMOVED_ZERO_CONFIG_KEYS} == REMOVED
    sources = [path.read_text() for path in Path(config.__file__).parents[1].rglob("*.py")]
    for name in {name.partition(".")[0] for name in KNOWN}:
        assert any(re.search(rf"""["']{name}["']""", text) for text in sources), name


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({}, "none"),
        ({"zero_optimization": {}}, "none"),
        ({"zero_optimization": {"offload_optimizer": None}}, "none"),
        ({"zero_optimization": {"offload_optimizer": {}}}, "none"),
        ({"zero_optimization": {"offload_optimizer": {"device": "none"}}}, "none"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "cpu"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "none"),
    ],
)
def test_the_device_of_an_offload_block(settings: dict[str, Any], device: str) -> None:
    assert offload_device(settings, "offload_optimizer") == device


def test_deepspeeds_own_spelling_of_the_flag(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"wall_clock_breakdown": True}))
    for flag in ("--ds_config", "--ds-config", "--deepspeed_config", "--deepspeed-config"):
        argv = ["--config", str(SFT), flag, str(file)]
        run = load_run(argv, default_config=SFT, prog="sft.py", description="A.")
        assert run.deepspeed == {"wall_clock_breakdown": True}
