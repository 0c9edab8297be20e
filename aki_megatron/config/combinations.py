"""What works together and what does not: one table, read by the validator, the documentation and the tests.

Every axis has a few cells; a row names the cells it is about, axes it does not name are about all of theirs. A run is
accepted when a supported row matches it and no refused one does.
Regenerate the page: ``python -m aki_megatron.config.combinations > docs/combinations.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aki_megatron.config.run import RunConfig

ZERO = "tests/distributed/test_zero.py"
SPREAD = "tests/distributed/test_spread.py"
OFFLOAD = "tests/distributed/test_offload.py"


@dataclass(frozen=True)
class Axis:
    """One column of the table."""

    heading: str
    cells: tuple[str, ...]
    cell: Callable[[RunConfig], str]
    """Where a run stands on this axis."""
    shown: Callable[[RunConfig], str]
    """The same in the words of the config: the key and its value."""


def offload_device(run: RunConfig, what: str) -> str:
    """DeepSpeed's ``offload_optimizer`` or ``offload_param``: the device it moves state to, or "none"."""
    block = run.deepspeed.get("zero_optimization", {}).get(what, {})
    return str(block.get("device", "none"))


def _offload(run: RunConfig) -> str:
    if offload_device(run, "offload_param") != "none":
        return "weights"
    device = offload_device(run, "offload_optimizer")
    return "none" if device == "none" else f"optimizer to {device}"


def _offload_shown(run: RunConfig) -> str:
    what = "offload_param" if _offload(run) == "weights" else "offload_optimizer"
    return f"ds_config zero_optimization.{what}.device={offload_device(run, what)}"


def _one_or_more(number: int) -> str:
    return "1" if number == 1 else "> 1"


def _size_axis(name: str) -> Axis:
    return Axis(
        heading=name,
        cells=("1", "> 1"),
        cell=lambda run: _one_or_more(getattr(run.parallel, name)),
        shown=lambda run: f"parallel.{name}={getattr(run.parallel, name)}",
    )


AXES: dict[str, Axis] = {
    "tensor": _size_axis("tensor"),
    "pipeline": _size_axis("pipeline"),
    "virtual_stages": _size_axis("virtual_stages"),
    "zero": Axis(
        heading="ZeRO",
        cells=("0", "1", "2", "3"),
        cell=lambda run: str(run.parallel.zero_stage),
        shown=lambda run: f"parallel.zero_stage={run.parallel.zero_stage}",
    ),
    "precision": Axis(
        heading="precision",
        cells=("fp32", "bf16"),
        cell=lambda run: run.train.precision,
        shown=lambda run: f"train.precision={run.train.precision}",
    ),
    "recompute": Axis(
        heading="recompute",
        cells=("none", "full"),
        cell=lambda run: run.parallel.recompute,
        shown=lambda run: f"parallel.recompute={run.parallel.recompute}",
    ),
    "offload": Axis(
        heading="offload",
        cells=("none", "optimizer to cpu", "optimizer to nvme", "weights"),
        cell=_offload,
        shown=_offload_shown,
    ),
    "rule": Axis(
        heading="rule",
        cells=("causal", "mma"),
        cell=lambda run: run.attention.rule,
        shown=lambda run: f"attention.rule={run.attention.rule}",
    ),
}
"""In the order of the columns. Data parallelism and packing are columns of the page too; both go with everything."""


@dataclass(frozen=True)
class Combination:
    """One row: supported with the test that proves it, or refused with the reason and the way out."""

    name: str
    where: Mapping[str, tuple[str, ...]]
    """Axis -> the cells the row is about; all of them where an axis is not named."""
    proof: str = ""
    """File of the test that proves a supported row."""
    reason: str = ""
    """Why a refused row is refused."""
    way_out: str = ""
    """What to change."""

    def matches(self, run: RunConfig) -> bool:
        """Whether the row is about this run."""
        return all(AXES[name].cell(run) in cells for name, cells in self.where.items())

    def refusal(self, run: RunConfig) -> str:
        """The sentence for a run that this row refuses."""
        keys = " with ".join(AXES[name].shown(run) for name in self.where)
        return f"{keys}: {self.reason}; {self.way_out}."


SHARDED = ("1", "2", "3")
OFFLOADED = ("optimizer to cpu", "optimizer to nvme")

COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        name="data parallelism",
        where={"tensor": ("1",), "pipeline": ("1",), "virtual_stages": ("1",), "zero": SHARDED, "offload": ("none",)},
        proof=ZERO,
    ),
    Combination(
        name="tensor parallelism",
        where={"tensor": ("> 1",), "pipeline": ("1",), "virtual_stages": ("1",), "zero": SHARDED, "offload": ("none",)},
        proof=SPREAD,
    ),
    Combination(
        name="pipeline parallelism (1F1B)",
        where={"tensor": ("1",), "pipeline": ("> 1",), "virtual_stages": ("1",), "zero": SHARDED, "offload": ("none",)},
        proof=SPREAD,
    ),
    Combination(
        name="tensor x pipeline parallelism (1F1B)",
        where={
            "tensor": ("> 1",),
            "pipeline": ("> 1",),
            "virtual_stages": ("1",),
            "zero": SHARDED,
            "offload": ("none",),
        },
        proof=SPREAD,
    ),
    Combination(
        name="pipeline parallelism (interleaved 1F1B)",
        where={"pipeline": ("> 1",), "virtual_stages": ("> 1",), "zero": SHARDED, "offload": ("none",)},
        proof=SPREAD,
    ),
    Combination(
        name="without DeepSpeed",
        where={
            "pipeline": ("1",),
            "virtual_stages": ("1",),
            "zero": ("0",),
            "precision": ("fp32",),
            "offload": ("none",),
        },
        proof=SPREAD,
    ),
    Combination(
        name="without DeepSpeed, pipeline parallelism",
        where={"pipeline": ("> 1",), "zero": ("0",), "precision": ("fp32",), "offload": ("none",)},
        proof=SPREAD,
    ),
    Combination(
        name="optimizer offload",
        where={"pipeline": ("1",), "virtual_stages": ("1",), "zero": ("2", "3"), "offload": ("optimizer to cpu",)},
        proof=OFFLOAD,
    ),
    Combination(
        name="ZeRO-0 in bf16",
        where={"zero": ("0",), "precision": ("bf16",)},
        reason=(
            "every rank would keep a whole fp32 copy of the weights and the whole optimizer state, which ZeRO-1 splits "
            "over the data ranks and sends no byte more"
        ),
        way_out="add --parallel.zero_stage 1, or --train.precision fp32",
    ),
    Combination(
        name="chunks without a pipeline",
        where={"pipeline": ("1",), "virtual_stages": ("> 1",)},
        reason="chunks take turns on the ranks of a pipeline, and here one rank holds all layers",
        way_out="add --parallel.virtual_stages 1, or --parallel.pipeline 2",
    ),
    Combination(
        name="optimizer offload with whole gradients",
        where={"zero": ("0", "1"), "offload": OFFLOADED},
        reason=(
            "state moves to the host together with the share of the gradients that a data rank owns; ZeRO-0 keeps its "
            "state on the device, and with ZeRO-1, where gradients stay whole, offloading is not proven"
        ),
        way_out="add --parallel.zero_stage 2, or set the device to none",
    ),
    Combination(
        name="optimizer offload with a pipeline",
        where={"pipeline": ("> 1",), "offload": OFFLOADED},
        reason=(
            "DeepSpeed copies a gradient to the host in the backward pass of a step's last micro-batch, which every "
            "stage runs at another time under the pipeline's schedule; that is not proven"
        ),
        way_out="add --parallel.pipeline 1, or set the device to none (more data ranks share the state)",
    ),
    Combination(
        name="optimizer offload to NVMe",
        where={"offload": ("optimizer to nvme",)},
        reason="optimizer state is offloaded to the host's memory only",
        way_out="set the device to cpu or none",
    ),
    Combination(
        name="weight offload",
        where={"offload": ("weights",)},
        reason=(
            "each weight is gathered once per step and stays whole until the step ends, so that offloading its share "
            "in between saves next to nothing"
        ),
        way_out="delete offload_param (more data ranks share the weights), or raise parallel.tensor or pipeline",
    ),
)


def refusals(run: RunConfig) -> list[str]:
    """Why this combination is refused; empty where it is supported."""
    found = [row.refusal(run) for row in COMBINATIONS if row.reason and row.matches(run)]
    if not found and not any(row.proof and row.matches(run) for row in COMBINATIONS):
        keys = ", ".join(axis.shown(run) for axis in AXES.values())
        supported = "; ".join(row.name for row in COMBINATIONS if row.proof)
        found.append(f"{keys}: this combination is in no row of what is supported: {supported}.")
    return found


HEAD = """\
# What works together

This page is generated from the table that also accepts or refuses a run (`aki_megatron/config/combinations.py`):

    python -m aki_megatron.config.combinations > docs/combinations.md

How to read it: a run stands in one cell of every column. It is accepted when a row of the first table is about all its
cells and no row of the second table is. "any" means every cell of the column:

| column | decided by | cells |
|---|---|---|
"""

KEYS = {
    "tensor": "`parallel.tensor`",
    "pipeline": "`parallel.pipeline`",
    "virtual_stages": "`parallel.virtual_stages`",
    "zero": "`parallel.zero_stage`",
    "precision": "`train.precision`",
    "recompute": "`parallel.recompute`",
    "offload": "`--ds_config`: `zero_optimization.offload_optimizer` and `offload_param`",
    "rule": "`attention.rule`",
}

BESIDE = """\
| data | number of ranks / (tensor x pipeline) | any size |
| packing | `data.packing.enabled`: several samples in one row, each a segment of its own | any |

Data parallelism is in every row, at any size that divides `train.global_batch_size`. Packed rows are part of the batches
with which the rows are proven.

## Supported

Proven means: losses, gradient norms and every final weight equal those of one process, in fp32.

"""

REFUSED = """
## Refused

A run that one of these rows is about ends before it starts, with the reason and the way out.

"""

FOOT = """
Sizes have rules of their own, which do not depend on the combination: `parallel.tensor` divides the decoder's heads,
key and value heads, `intermediate_size` and `padded_vocab_size`; `parallel.pipeline` x `parallel.virtual_stages` is at most the number of
decoder layers; `train.global_batch_size` is a multiple of the data ranks. Captions are refused under `mma`, because image
places would see what is learnt.
"""


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def _cells(row: Combination) -> list[str]:
    return [", ".join(row.where[name]) if name in row.where else "any" for name in AXES]


def page() -> str:
    """docs/combinations.md"""
    headings = [axis.heading for axis in AXES.values()]
    axes = "".join(f"| {axis.heading} | {KEYS[name]} | {', '.join(axis.cells)} |\n" for name, axis in AXES.items())
    supported = [["", *headings, "data", "packing", "proven by"]] + [
        [row.name, *_cells(row), "any", "any", f"[{row.proof.rpartition('/')[2]}](../{row.proof})"]
        for row in COMBINATIONS
        if row.proof
    ]
    refused = [["", *headings, "reason", "way out"]] + [
        [row.name, *_cells(row), row.reason, row.way_out] for row in COMBINATIONS if row.reason
    ]
    return HEAD + axes + BESIDE + _table(supported) + REFUSED + _table(refused) + FOOT


if __name__ == "__main__":
    print(page(), end="")
