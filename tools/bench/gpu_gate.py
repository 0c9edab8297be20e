"""Check the CUDA attention kernels against float64 on this machine's GPU and time them: the gate of a new machine.

    python tools/bench/gpu_gate.py                 # under eight minutes on one GPU; exit code 1 if a check fails
    python tools/bench/gpu_gate.py --json gate.json

Without a GPU it says so and exits with 0. Run it after every change of PyTorch, driver or kernel.

A check: one rule, one batch, one head_dim, one form of the kernel, bfloat16, forward and backward. Its error against
dense float64 attention may be at most 1.3 times that of dense bfloat16 attention. The batches: equal lengths, ragged,
several turns, packed; every second check shares key heads (grouped-query). The forms: gathered and merged
(varlen_plan.py).
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from attention import measure, show
from attention_cases import cases
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.attention.dense import attend_dense
from aki_megatron.attention.varlen_kernel import attend_varlen, torch_varlen
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig
from aki_megatron.console import Console, Table
from aki_megatron.types import Modality

LIMIT = 1.3
HEAD_DIMS = (64, 96, 128)
IMAGE_TOKENS = 144
FORMS = ("gathered", "merged")


@dataclass(frozen=True)
class Check:
    """The worst of output, dq, dk, dv: our error over that of dense bfloat16 attention, both against float64."""

    rule: str
    batch: str
    head_dim: int
    heads: str
    form: str
    error: float
    ratio: float

    @property
    def passed(self) -> bool:
        """Within the limit, and a number at all."""
        return self.ratio <= LIMIT


def batches() -> dict[str, tuple[Tensor, Tensor]]:
    """Modality and segment ids [B, T] by name."""
    rng = random.Random(0)

    def sample(turns: int) -> list[int]:
        ids: list[int] = [int(Modality.TEXT)] * 12 + [int(Modality.IMAGE)] * IMAGE_TOKENS
        for _ in range(turns):
            ids += [Modality.TEXT] * rng.randint(10, 100) + [Modality.RESPONSE] * rng.randint(20, 200)
        return ids

    equal = sample(1)
    named = {
        "equal": [[equal]] * 4,
        "ragged": [[sample(1)] for _ in range(4)],
        "turns": [[sample(4)] for _ in range(2)],
        "packed": [[sample(rng.randint(1, 3)) for _ in range(5)] for _ in range(2)],
    }
    batches = {}
    for name, batch in named.items():
        length = max(sum(len(ids) for ids in sequence) for sequence in batch) + 7
        modality = torch.zeros(len(batch), length, dtype=torch.int8)
        segment = torch.full((len(batch), length), -1, dtype=torch.int32)
        for b, sequence in enumerate(batch):
            start = 0
            for number, ids in enumerate(sequence):
                modality[b, start : start + len(ids)] = torch.tensor(ids, dtype=torch.int8)
                segment[b, start : start + len(ids)] = number
                start += len(ids)
        batches[name] = (modality, segment)
    return batches


def run(name: str, mask: AttentionMask, tensors: list[Tensor]) -> list[Tensor]:
    """Output, dq, dk, dv of dense attention, or of a form of the CUDA kernel."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = attend_dense(q, k, v, mask) if name == "dense" else attend_varlen(q, k, v, mask, merged=name == "merged")
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def relative_errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative L2 errors of output, dq, dk, dv."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


def check(mask: AttentionMask, batch: str, heads: tuple[int, int, int]) -> list[Check]:
    """Every form of the kernel under one mask against float64; heads = (query heads, key heads, head_dim)."""
    query, key, head_dim = heads
    generator = torch.Generator(device="cuda").manual_seed(0)
    tensors = [
        torch.randn(*mask.shape, count, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(
            1, 2
        )
        for count in (query, key, key, query)
    ]
    exact = run("dense", mask, [x.double() for x in tensors])
    dense = relative_errors(run("dense", mask, tensors), exact)
    checks = []
    for form in FORMS:
        ours = relative_errors(run(form, mask, tensors), exact)
        ratio = max(a / b for a, b in zip(ours, dense, strict=True))
        checks.append(Check(mask.attention.rule, batch, head_dim, f"{query}/{key}", form, max(ours), ratio))
    return checks


def all_checks() -> list[Check]:
    """Every rule, batch and head_dim."""
    checks: list[Check] = []
    for number, (batch, (modality, segment)) in enumerate(batches().items()):
        unsupervised = torch.zeros(modality.shape, dtype=torch.bool)
        for rule in ATTENTION_RULES:
            attention = AttentionConfig(rule=rule)
            mask = AttentionMask.build(modality, segment, attention, supervised=unsupervised, image_tokens=IMAGE_TOKENS)
            for head_dim in HEAD_DIMS:
                heads = (8, 2 if (number + head_dim // 32) % 2 else 8, head_dim)
                checks += check(mask, batch, heads)
    return checks


def table_of(checks: list[Check]) -> Table:
    """Return the checks as a table."""
    table = Table("rule", "batch", "head_dim", "heads", "form", "error", "ratio to dense bf16", "")
    for one in checks:
        row = (one.rule, one.batch, str(one.head_dim), one.heads, one.form, f"{one.error:.1e}", f"{one.ratio:.2f}")
        table.add_row(*row, "ok" if one.passed else "FAILED")
    return table


def main(argv: list[str] | None = None) -> int:
    """Check, time, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write checks and timings to this file")
    arguments = parser.parse_args(argv)
    console = Console()
    if not torch.cuda.is_available():
        console.print("No CUDA GPU here: nothing to check. The CPU kernels are checked by the tests (make test).")
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    start = time.perf_counter()
    machine = (
        f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, {torch_varlen(device).implementation}"
    )
    console.print(machine)
    checks = all_checks()
    console.print(table_of(checks))
    timings = [row for case in cases() for row in measure(case, torch.bfloat16, 10, device)]
    show(timings, console)
    failed = sum(not one.passed for one in checks)
    console.print(f"{len(checks) - failed} of {len(checks)} checks passed, {time.perf_counter() - start:.0f} s")
    if arguments.json:
        report = {"machine": machine, "checks": [asdict(one) for one in checks], "timings": timings}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
