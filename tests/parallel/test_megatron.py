"""Adapter of megatron-core: vocab-parallel loss, summed gradients, lazy import, refused versions."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import Tensor

from aki_megatron.errors import ConfigError
from aki_megatron.model.loss import token_loss_sum
from aki_megatron.model.sharding import ShardSpec, shard_tensor
from aki_megatron.parallel import megatron
from aki_megatron.parallel.megatron import TensorParallelLinears, build_linears
from aki_megatron.parallel.topology import Topology


def vocab_parallel_loss(topology: Topology, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, bool]:
    linears = build_linears(topology)
    mine = shard_tensor(logits, ShardSpec(1, (logits.shape[1],)), topology.tensor_rank, topology.tensor).to(
        topology.device
    )
    mine = mine.contiguous().requires_grad_()
    before = mine.detach().clone()
    loss = linears.loss_sum(mine, targets.to(topology.device))
    (3 * loss).backward()
    return loss.detach().cpu(), mine.grad.cpu(), torch.equal(before, mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_positions", [0, 1, 7])
def test_loss_with_padding_columns(run_on, num_positions, dtype):
    draw = torch.Generator().manual_seed(num_positions)
    logits = 30 * torch.randn(num_positions, 16, generator=draw)
    logits[:, 11:] = -torch.inf  # the whole range of the last of four ranks and part of the third's
    logits = logits.to(dtype)
    targets = torch.randint(0, 11, (num_positions,), generator=draw)
    plain = logits.clone().requires_grad_()
    wanted = token_loss_sum(plain, targets)
    (3 * wanted).backward()
    for rank, (loss, gradient, untouched) in enumerate(run_on(4, vocab_parallel_loss, logits, targets, tensor=4)):
        assert loss.dtype == wanted.dtype
        assert gradient.dtype == dtype
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, plain.grad[:, 4 * rank : 4 * rank + 4])
        assert untouched


def gradients_of_copied(topology: Topology) -> list[Tensor]:
    """Gradients that are an expanded scalar, transposed, and shared with another tensor."""
    linears, found = build_linears(topology), []
    scale = topology.tensor_rank + 1.0
    x, other = (torch.zeros(2, 3, device=topology.device, requires_grad=True) for _ in range(2))
    table = torch.arange(6.0, device=topology.device).view(3, 2)
    for use in (lambda y: y.sum(), lambda y: (y.t() * table).sum(), lambda y: ((y + other) * table.t()).sum()):
        x.grad = None
        (scale * use(linears.copy_to_tensor_parallel_region(x))).backward()
        found.append(x.grad.cpu())
    return [*found, other.grad.cpu() / scale]


def test_gradients_of_copied_tensors_are_summed_whatever_their_strides(run_on):
    table = torch.arange(6.0).view(3, 2).t()
    for found in run_on(2, gradients_of_copied, tensor=2):
        for got, want in zip(found, [torch.full((2, 3), 3.0), 3 * table, 3 * table, table], strict=True):
            assert torch.equal(got, want)


def test_megatron_is_imported_only_for_tensor_parallelism_and_without_output():
    program = """if True:
        import sys
        from types import SimpleNamespace
        from aki_megatron.model.linears import LocalLinears
        from aki_megatron.parallel import megatron
        assert isinstance(megatron.build_linears(SimpleNamespace(tensor=1)), LocalLinears)
        assert not any(name.partition(".")[0] == "megatron" for name in sys.modules)
        megatron._load()
        assert "megatron.core" in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("installed", [None, "0.15.0"])
def test_other_versions_are_refused(monkeypatch, installed):
    def version(name: str) -> str:
        assert name == "megatron-core"
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(megatron, "version", version)
    megatron._load.cache_clear()
    found = "which is not installed" if installed is None else "megatron-core 0.15.0 is installed"
    with pytest.raises(ConfigError, match=rf"{found}.*pip install megatron-core==0\.16\.1.*parallel\.tensor=1"):
        TensorParallelLinears(Topology(0, 2, 0, 2, 1, 1, torch.device("cpu"), {}))
