"""The table of what works together: complete, proven, what the page shows, and what the validator applies."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from aki_megatron.config import combinations
from aki_megatron.config.combinations import AXES, COMBINATIONS, KEYS, page, refusals
from aki_megatron.config.cross_checks import check_run, contradictions
from aki_megatron.config.deepspeed_keys import KNOWN, SPECIAL
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SFT = ROOT / "configs/demo/sft.yaml"


@cache
def base() -> dict[str, Any]:
    """Sections of the demo's fine-tuning run with four layers: enough for two ranks of two virtual stages."""
    argv = ["--config", str(SFT), "--model.decoder.num_layers", "4"]
    run = load_run(argv, default_config=SFT, prog="sft.py", description="A.")
    return {name: getattr(run, name) for name in RunConfig.model_fields}


OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer to cpu": {"offload_optimizer": {"device": "cpu", "pin_memory": False}},
    "optimizer to nvme": {"offload_optimizer": {"device": "nvme"}},
    "weights": {"offload_param": {"device": "cpu"}},
}


def build(
    tensor: int, pipeline: int, virtual_stages: int, zero: int, precision: str, recompute: str, offload: str, rule: str
) -> RunConfig:
    parts = base()
    parallel = {
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_stages": virtual_stages,
        "zero_stage": zero,
        "recompute": recompute,
    }
    zero_optimization = OFFLOADS[offload]
    return RunConfig(
        **parts
        | {
            "parallel": parallel,
            "train": parts["train"].model_copy(update={"precision": precision}),
            "attention": {"rule": rule},
            "deepspeed": {"zero_optimization": zero_optimization} if zero_optimization else {},
        }
    )


def refused_keys(
    tensor: int, pipeline: int, virtual_stages: int, zero: int, precision: str, recompute: str, offload: str, rule: str
) -> list[list[str]]:
    """An independent statement of what is refused: the keys that each sentence has to name."""
    found = []
    if zero == 0 and precision == "bf16":
        found.append(["parallel.zero_stage=0", "train.precision=bf16", "--parallel.zero_stage 1"])
    if pipeline == 1 and virtual_stages > 1:
        found.append(
            ["parallel.pipeline=1", f"parallel.virtual_stages={virtual_stages}", "--parallel.virtual_stages 1"]
        )
    device = f"zero_optimization.offload_optimizer.device={offload.rpartition(' ')[2]}"
    if offload.startswith("optimizer") and zero < 2:
        found.append([f"parallel.zero_stage={zero}", device, "--parallel.zero_stage 2"])
    if offload.startswith("optimizer") and pipeline > 1:
        found.append([f"parallel.pipeline={pipeline}", device, "--parallel.pipeline 1"])
    if offload == "optimizer to nvme":
        found.append([device, "set the device to cpu or none"])
    if offload == "weights":
        found.append(["zero_optimization.offload_param.device=cpu", "delete offload_param"])
    return found


SPREADS = list(product((1, 2, 4), (1, 2), (1, 2), (0, 1, 2, 3)))


@pytest.mark.parametrize(("tensor", "pipeline", "virtual_stages", "zero"), SPREADS)
def test_runs_are_accepted_and_refused_as_the_table_says(
    tensor: int, pipeline: int, virtual_stages: int, zero: int
) -> None:
    for rest in product(("fp32", "bf16"), ("none", "full"), OFFLOADS, AXES["rule"].values):
        combination = (tensor, pipeline, virtual_stages, zero, *rest)
        run, expected = build(*combination), refused_keys(*combination)
        problems = contradictions(run)
        assert problems == refusals(run)
        assert len(problems) == len(expected), problems
        for keys in expected:
            assert any(all(key in sentence for key in keys) for sentence in problems), (keys, problems)
        with pytest.raises(ConfigError) if expected else nullcontext():
            check_run(run)


def test_every_combination_is_either_supported_or_refused() -> None:
    for combination in product(*(axis.values for axis in AXES.values())):
        run = dict(zip(AXES, combination, strict=True))
        rows = [row for row in COMBINATIONS if all(run[name] in values for name, values in row.covers.items())]
        supported, refused = [row for row in rows if row.proof], [row for row in rows if row.reason]
        assert bool(supported) != bool(refused), run
        assert len(supported) <= 1, run


def test_rows_name_axes_and_values_that_exist() -> None:
    assert list(KEYS) == list(AXES)
    for row in COMBINATIONS:
        assert bool(row.proof) != bool(row.reason) and bool(row.reason) == bool(row.fix), row.name
        for name, values in row.covers.items():
            assert set(values) <= set(AXES[name].values), row.name
    assert len({row.name for row in COMBINATIONS}) == len(COMBINATIONS)


def test_a_run_has_a_value_on_every_axis() -> None:
    for spread in SPREADS:
        run = RunConfig.model_construct(
            **base() | {"parallel": base()["parallel"].model_copy(update=dict(zip(NAMES, spread, strict=True)))}
        )
        for axis in AXES.values():
            assert axis.value(run) in axis.values


NAMES = ("tensor", "pipeline", "virtual_stages", "zero_stage")


def test_every_proof_is_there() -> None:
    for row in COMBINATIONS:
        assert not row.proof or (ROOT / row.proof).is_file(), row.proof


def test_what_no_row_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(1, 1, 1, 3, "fp32", "none", "none", "mma")
    tensor_only = tuple(row for row in COMBINATIONS if row.name == "tensor parallelism")
    monkeypatch.setattr(combinations, "COMBINATIONS", tensor_only)
    (sentence,) = refusals(run)
    assert "parallel.tensor=1" in sentence and "in no row of what is supported: tensor parallelism" in sentence


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs/combinations.md").read_text() == page(), (
        "regenerate it: python -m aki_megatron.config.combinations > docs/combinations.md"
    )


def test_the_page_shows_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = page().splitlines()
    for row in COMBINATIONS:
        (line,) = [line for line in lines if line.startswith(f"| {row.name} |")]
        assert row.proof in line if row.proof else f"| {row.reason} | {row.fix} |" in line
    changed = (replace(COMBINATIONS[0], name="another name"), *COMBINATIONS[1:])
    monkeypatch.setattr(combinations, "COMBINATIONS", changed)
    assert "| another name |" in page()


def test_the_page_shows_every_setting_of_deepspeed() -> None:
    text = page()
    assert all(f"| `{name}` |" in text for name in KNOWN - SPECIAL)
    assert "| `zero_optimization.round_robin_gradients` | `false` |" in text
