"""Time and memory of the attention kernels at the shapes of Phi-3.5-mini, as ratios to causal flash attention.

    python tools/bench/attention.py                        # all cases, float32 and bfloat16: about ten minutes
    python tools/bench/attention.py --cases 656 "packed 4096" --dtypes bfloat16 --repeats 3
    python tools/bench/attention.py --json attention.json  # also as a list of objects

The baseline of every case is the same kernel under rule causal, on the same samples: causal flash of the same segments.
Forward and backward together; the variants alternate in one process, and a ratio is the median over the repeats. On a
CPU the time is that of one thread, so that other programs disturb little; on CUDA it is elapsed time with all 32 heads.
Ratios are the result, not seconds: the number of heads is reduced on a CPU.

    mma             what training runs
    dense bool      PyTorch's attention with the whole mask [T, T], for contrast; left out above 8192 tokens
    outside         fraction of the time of mma spent outside the flash kernels: index arithmetic, merging, Python
    peak            memory above the inputs at its highest, MiB
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from typing import Any

import torch
from attention_cases import Case, cases, inputs, step
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aki_megatron.attention import attend, cpu_kernel
from aki_megatron.console import Console, Table

MAX_DENSE_LENGTH = 8192
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def variants(case: Case, device: torch.device) -> dict[str, Run]:
    """What is measured, by name; the first is the baseline."""
    causal, mma = case.mask("causal"), case.mask("mma")
    runs: dict[str, Run] = {
        "causal": lambda q, k, v: attend(q, k, v, causal),
        "mma": lambda q, k, v: attend(q, k, v, mma),
    }
    if case.length <= MAX_DENSE_LENGTH:
        dense = mma.dense()
        # let padding see itself: the mask costs the same, and no kernel gets an empty query
        dense |= ~dense.any(-1, keepdim=True) & torch.eye(case.length, dtype=torch.bool)
        dense = dense[:, None].to(device)
        runs["dense bool"] = lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=dense)
    return runs


def seconds(device: torch.device) -> float:
    """The clock: of this thread on a CPU, elapsed after all work is done on CUDA."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()


def ratios(runs: dict[str, Run], tensors: list[Tensor], repeats: int, device: torch.device) -> dict[str, float]:
    """Time of a step over that of causal for each variant: the median over repeats, after one to warm up.

    Within a repeat the variants follow each other at once, so that a machine whose speed drifts disturbs no ratio.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = seconds(device)
            step(run, *tensors)
            if repeat:
                times[name].append(seconds(device) - start)
    baseline = times["causal"]
    return {
        name: statistics.median(own / causal for own, causal in zip(values, baseline, strict=True))
        for name, values in times.items()
    }


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory on a CPU is measured on Linux only")


def peak_mib(run: Run, tensors: list[Tensor], device: torch.device) -> float:
    """Memory of one step above its inputs, at its highest."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        step(run, *tensors)
        return (torch.cuda.max_memory_allocated(device) - allocated) / 2**20
    # memory that the allocator holds back would hide what the next step allocates
    CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(run, *tensors)
    return resident("VmHWM") - before


def outside_kernels(run: Run, tensors: list[Tensor]) -> float:
    """Fraction of the thread's time spent outside PyTorch's flash kernels (CPU)."""
    inside = [0.0]

    def timed(kernel: Any) -> Any:
        def call(*arguments: object, **options: object) -> object:
            start = time.thread_time()
            result = kernel(*arguments, **options)
            inside[0] += time.thread_time() - start
            return result

        return call

    forward, backward = cpu_kernel.flash_forward, cpu_kernel.flash_backward
    cpu_kernel.flash_forward, cpu_kernel.flash_backward = timed(forward), timed(backward)
    try:
        start = time.thread_time()
        step(run, *tensors)
        return 1 - inside[0] / (time.thread_time() - start)
    finally:
        cpu_kernel.flash_forward, cpu_kernel.flash_backward = forward, backward


def measure(case: Case, dtype: torch.dtype, repeats: int, device: torch.device) -> list[dict[str, object]]:
    """Rows of the table for one case."""
    tensors = inputs(case, 32 if device.type == "cuda" else case.heads, dtype, device)
    runs = variants(case, device)
    ratio = ratios(runs, tensors, repeats, device)
    rows: list[dict[str, object]] = []
    for name, run in runs.items():
        row: dict[str, object] = {
            "case": case.name,
            "variant": name,
            "dtype": str(dtype).removeprefix("torch."),
            "ratio_to_causal": round(ratio[name], 3),
            "peak_mib": round(peak_mib(run, tensors, device), 1),
        }
        if name == "mma" and device.type == "cpu":
            row["outside_kernels"] = round(outside_kernels(run, tensors), 4)
        rows.append(row)
    return rows


def show(rows: list[dict[str, object]], console: Console) -> None:
    """The table."""
    table = Table("case", "dtype", "variant", "ratio to causal", "peak MiB", "outside kernels")
    for row in rows:
        outside = f"{row['outside_kernels']:.1%}" if "outside_kernels" in row else ""
        table.add_row(
            str(row["case"]), str(row["dtype"]), str(row["variant"]), f"{row['ratio_to_causal']:.2f}",
            f"{row['peak_mib']:.0f}", outside,
        )  # fmt: skip
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    names = [case.name for case in cases()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE", help=f"of {names}")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5, help="steps of each variant and case; default: 5")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    # the clock of this thread does not count a backward pass in another one
    with torch.autograd.set_multithreading_enabled(False):
        for case in (case for case in cases() if case.name in arguments.cases):
            for dtype in arguments.dtypes:
                if arguments.device == "cuda" and dtype == "float32":
                    continue
                rows += measure(case, getattr(torch, dtype), arguments.repeats, torch.device(arguments.device))
    show(rows, Console())
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
