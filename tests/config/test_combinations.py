"""The table of what works together: complete, proven, as the page says it, and what the validator goes by."""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from aki_megatron.config import combinations
from aki_megatron.config.combinations import AXES, COMBINATIONS, KEYS, page, refusals
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SFT = ROOT / "configs/demo/sft.yaml"


@cache
def base() -> dict[str, Any]:
    """The demo's second stage with four layers: enough for two ranks of two chunks."""
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
    """What is refused, said once more in plain words: the keys each sentence has to name."""
    found = []
    if zero == 0 and precision == "bf16":
        found.append(["parallel.zero_stage=0", "train.precision=bf16", "--parallel.zero_stage 1"])
    if pipeline == 1 and virtual_stages > 1:
        found.append(["parallel.pipeline=1", f"parallel.virtual_stages={virtual_stages}", "--parallel.virtual_stages 1"])
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
def test_runs_are_accepted_and_refused_as_the_table_says(tensor: int, pipeline: int, virtual_stages: int, zero: int) -> None:
    for rest in product(("fp32", "bf16"), ("none", "full"), OFFLOADS, ("causal", "mma")):
        cell = (tensor, pipeline, virtual_stages, zero, *rest)
        expected = refused_keys(*cell)
        if not expected:
            assert refusals(build(*cell)) == []
            continue
        with pytest.raises(ConfigError) as caught:
            build(*cell)
        said = getattr(caught.value, "problems")  # noqa: B009
        assert len(said) == len(expected), said
        for words in expected:
            assert any(all(word in sentence for word in words) for sentence in said), (words, said)


def test_every_cell_is_either_supported_or_refused() -> None:
    for cell in product(*(axis.cells for axis in AXES.values())):
        where = dict(zip(AXES, cell, strict=True))
        about = [row for row in COMBINATIONS if all(where[name] in cells for name, cells in row.where.items())]
        supported, refused = [row for row in about if row.proof], [row for row in about if row.reason]
        assert bool(supported) != bool(refused), where
        assert len(supported) <= 1, where


def test_rows_name_axes_and_cells_that_exist() -> None:
    assert list(KEYS) == list(AXES)
    for row in COMBINATIONS:
        assert bool(row.proof) != bool(row.reason) and bool(row.reason) == bool(row.way_out), row.name
        for name, cells in row.where.items():
            assert set(cells) <= set(AXES[name].cells), row.name
    assert len({row.name for row in COMBINATIONS}) == len(COMBINATIONS)


def test_a_run_stands_in_a_cell_of_every_axis() -> None:
    for spread in SPREADS:
        run = RunConfig.model_construct(
            **base() | {"parallel": base()["parallel"].model_copy(update=dict(zip(NAMES, spread, strict=True)))}
        )
        for axis in AXES.values():
            assert axis.cell(run) in axis.cells


NAMES = ("tensor", "pipeline", "virtual_stages", "zero_stage")


def test_every_proof_is_there() -> None:
    for row in COMBINATIONS:
        assert not row.proof or (ROOT / row.proof).is_file(), row.proof


def test_what_no_row_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(1, 1, 1, 3, "fp32", "none", "none", "mma")
    tensor_only = tuple(row for row in COMBINATIONS if row.name == "tensor parallelism")
    monkeypatch.setattr(combinations, "COMBINATIONS", tensor_only)
    (said,) = refusals(run)
    assert "parallel.tensor=1" in said and "in no row of what is supported: tensor parallelism" in said


def test_the_page_is_the_table() -> None:
    assert (ROOT / "docs/combinations.md").read_text() == page(), (
        "regenerate it: python -m aki_megatron.config.combinations > docs/combinations.md"
    )


def test_the_page_shows_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = page().splitlines()
    for row in COMBINATIONS:
        (line,) = [line for line in lines if line.startswith(f"| {row.name} |")]
        assert row.proof in line if row.proof else f"| {row.reason} | {row.way_out} |" in line
    changed = (replace(COMBINATIONS[0], name="another name"), *COMBINATIONS[1:])
    monkeypatch.setattr(combinations, "COMBINATIONS", changed)
    assert "| another name |" in page()
