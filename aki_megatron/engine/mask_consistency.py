"""Check that all ranks of a replica use the same attention mask: each builds it from ids that were communicated."""

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.errors import UserError
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import StackedIds


class MaskMismatchError(UserError):
    """Ranks that work on the same samples built different attention masks, or have different positions or targets."""


class MaskConsistencyChecker:
    """Digests of the masks one rank used in one step, to be compared over the ranks of its replica."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._digests: dict[tuple[int, int], int] = {}
        self._rules: set[str] = set()

    def record(self, stage: int, microbatch_index: int, mask: AttentionMask, ids: StackedIds) -> None:
        """Note the mask that stage ``stage`` of the model uses for a micro-batch, and its positions and targets."""
        digest = hashlib.blake2b(mask.digest.encode(), digest_size=7)
        positions_and_targets = torch.stack([ids.position_ids, ids.targets], dim=-1)
        digest.update(positions_and_targets.cpu().numpy().tobytes())
        self._digests[stage, microbatch_index] = int.from_bytes(digest.digest())
        self._rules.add(mask.attention.rule)

    def compare(self) -> None:
        """Raise MaskMismatchError on every rank of the replica where two of them differ; collective."""
        topology = self._topology
        if topology.tensor * topology.pipeline == 1:
            return
        # all ranks have as many stages and visit the same micro-batches, so the sorted entries correspond
        own = torch.tensor([digest for _, digest in sorted(self._digests.items())], device=topology.device)
        ranks = dist.get_process_group_ranks(topology.replica_group)
        digests = [torch.empty_like(own) for _ in ranks]
        dist.all_gather(digests, own, group=topology.replica_group)
        if all(torch.equal(other, digests[0]) for other in digests):
            return
        labels: list[tuple[int, int, str]] = [(0, 0, "")] * len(ranks)
        own_label = (topology.pipeline_rank, topology.tensor_rank, "/".join(sorted(self._rules)))
        dist.all_gather_object(labels, own_label, group=topology.replica_group)
        raise MaskMismatchError(_message(ranks, digests, labels))


def _message(ranks: list[int], digests: list[Tensor], labels: list[tuple[int, int, str]]) -> str:
    """List the ranks in groups that agree, the largest first."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for rank, own, (pipeline_rank, tensor_rank, rules) in zip(ranks, digests, labels, strict=True):
        name = f"rank {rank} (pipeline {pipeline_rank}, tensor {tensor_rank}, rule {rules})"
        groups.setdefault(tuple(own.tolist()), []).append(name)
    largest_first = sorted(groups.values(), key=len, reverse=True)
    lines = "\n  differs from\n  ".join(", ".join(names) for names in largest_first)
    return (
        f"The ranks of a replica have built different attention masks from the same samples:\n  {lines}\n"
        "They must agree on the attention section, and modality, segment, position and target ids must reach every "
        "stage unchanged. Check that all nodes run the same code and configuration; no weight was changed by this step."
    )
