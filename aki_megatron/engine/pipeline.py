"""The engine: one optimizer step of a model that is spread over tensor, pipeline and data ranks.

Stage runners hold the layers and the optimizer state; this drives them by the schedule, sends what crosses stages, and
decides for all ranks at once:

- The loss is a sum until the last moment: supervised tokens of the whole step are counted over all data ranks first.
  Runners average gradients over data ranks, so the loss is multiplied by data ranks / supervised tokens.
- One all-reduce over the world carries the loss, the square of the gradient norm, and what ranks want done after the
  step. Each element of the gradient counts once: copies that tensor ranks or the last stage's tied head hold are left
  out.
- A gradient that is not finite anywhere makes all ranks skip the step; so does ``accept``, which sees the same numbers
  on every rank.
- Ids travel with the hidden states, each stage rebuilds the attention layout from what it got, and layouts are compared
  over the ranks of a replica in the first step and in every ``mask_check_interval``-th after it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from aki_megatron.engine import global_state
from aki_megatron.engine.base import MAX_SKIPPED_IN_A_ROW, DivergedError, ShardedStage
from aki_megatron.engine.mask_consistency import MaskConsistencyChecker
from aki_megatron.engine.norm import clip_factor, squared_norm
from aki_megatron.model.split import cut, join, split_of
from aki_megatron.model.stage import global_names
from aki_megatron.parallel.batch_broadcast import MicrobatchShape, broadcast_batch, broadcast_shapes
from aki_megatron.parallel.p2p_communication import P2PCommunicator
from aki_megatron.parallel.schedule import Message, Work, schedule
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, ControlRequest, StageActivations, StepReport

WISHES = (ControlRequest.SAVE, ControlRequest.STOP)
"""Each has a place in the all-reduce at the end of a step."""


def _accept_all(_loss: float, _norm: float) -> bool:
    return True


def _tell_nobody(_place: str) -> None:
    pass


class PipelineEngine:
    """Engine over tensor, pipeline and data ranks; see aki_megatron.engine.base.Engine."""

    def __init__(
        self,
        runners: Sequence[ShardedStage],
        topology: Topology,
        *,
        micro_batches: int,
        precision: Literal["bf16", "fp32"],
        max_grad_norm: float,
        mask_check_interval: int,
        accept: Callable[[float, float], bool] = _accept_all,
        at: Callable[[str], None] = _tell_nobody,
    ) -> None:
        """Drive this rank's ``runners``, one per chunk, in model order; every rank has the same number of them.

        micro_batches  per step and data rank
        max_grad_norm      limit of the global gradient norm
        mask_check_interval    steps between comparisons of attention layouts
        accept         asked on every rank, with the same loss and finite gradient norm, before each update; False
                       discards the update
        at             told where in the step this rank is, often: it must be cheap
        """
        self._runners = runners
        self._topology = topology
        self._micro_batches = micro_batches
        self._clip_norm = max_grad_norm
        self._check_every = mask_check_interval
        self._accept = accept
        self._at = at
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._ticks = schedule(pipeline=topology.pipeline, chunks=len(runners), micro_batches=micro_batches)[
            topology.pipeline_rank
        ]
        self._wire = P2PCommunicator(topology, width=runners[0].stage.config.decoder.hidden_size, dtype=self._dtype)
        self._mesh = DeviceMesh.from_group(topology.stage_group, topology.device.type)
        self._names = [global_names(runner.stage) for runner in runners]
        self._steps_taken = 0
        self._not_finite_in_a_row = 0
        self.max_in_flight = 0
        """Most forwards whose backward was still to come; schedule.in_flight is its bound."""

    @property
    def max_buffered(self) -> int:
        """Most received messages that waited for their work; schedule.parked is its bound."""
        return self._wire.max_buffered

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, *, wish: ControlRequest = ControlRequest.NONE
    ) -> StepReport:
        """See Engine.train_step."""
        started = time.perf_counter()
        topology = self._topology
        self._at("counts tokens")
        sizes = broadcast_shapes(microbatches, self._micro_batches, topology)
        counts = [(size.supervised, size.real, size.rows * size.tokens, size.images, size.bad) for size in sizes]
        supervised, *others = topology.sum_over_data([sum(column) for column in zip(*counts, strict=True)])
        tokens, places, images, bad = (int(number) for number in others)
        ledger = MaskConsistencyChecker(topology) if self._steps_taken % self._check_every == 0 else None
        step = _Step(self, microbatches, sizes, topology.data / max(supervised, 1), ledger)
        loss = step.run()
        self.max_in_flight = max(self.max_in_flight, step.max_in_flight)
        if ledger is not None:
            ledger.compare()
        self._at("reduces")
        loss_sum, norm, control_signals = self._reduce(loss, wish)
        mean_loss = loss_sum / max(supervised, 1)
        skipped = not (math.isfinite(norm) and self._accept(mean_loss, norm))
        self._at("updates")
        self._update(lr, None if skipped else norm)
        self._steps_taken += 1
        self._count_not_finite(not math.isfinite(norm))
        return StepReport(
            loss=mean_loss,
            grad_norm=norm,
            lr=lr,
            supervised_tokens=int(supervised),
            tokens=tokens,
            places=places,
            images=images,
            bad_samples=bad,
            seconds=time.perf_counter() - started,
            skipped=skipped,
            wish=control_signals,
        )

    def _update(self, lr: float, norm: float | None) -> None:
        """Apply the gradients, of this global norm; None discards them."""
        for runner in self._runners:
            if norm is None:
                runner.discard()
                continue
            if (factor := clip_factor(norm, self._clip_norm)) < 1.0:
                runner.scale_gradients(factor)
            runner.update(lr)

    def _reduce(self, loss: Tensor, wish: ControlRequest) -> tuple[float, float, ControlRequest]:
        """Over the world: summed loss, gradient norm (inf if not finite), control_signals. Exchanges tied gradients before."""
        topology = self._topology
        square = torch.zeros((), dtype=torch.float64, device=topology.device)
        for runner in self._runners:
            for group in runner.gradients():
                copied = group.tied and runner.stage.front is None
                if group.tied and topology.pipeline > 1:
                    for tensor in group.tensors:
                        dist.all_reduce(tensor, group=topology.embedding_group)
                if not copied and (group.split or topology.tensor_rank == 0):
                    square += squared_norm(group.tensors, topology.device)
        counted = loss.double() if topology.tensor_rank == 0 else torch.zeros_like(square)
        wanted = torch.tensor([float(known in wish) for known in WISHES], dtype=torch.float64, device=topology.device)
        sums = torch.cat([torch.stack([counted, square]), wanted])
        dist.all_reduce(sums)
        loss_sum, square_sum, *counts = sums.tolist()
        control_signals = ControlRequest(sum(known for known, count in zip(WISHES, counts, strict=True) if count))
        return loss_sum, math.sqrt(square_sum) if math.isfinite(square_sum) else math.inf, control_signals

    def _count_not_finite(self, not_finite: bool) -> None:
        self._not_finite_in_a_row = self._not_finite_in_a_row + 1 if not_finite else 0
        if self._not_finite_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"The gradient was not finite in {self._not_finite_in_a_row} steps in a row: training has diverged. "
                "Lower optimizer.lr, lengthen optimizer.warmup_steps, or look at the data, and go on from a checkpoint."
            )

    def state(self) -> dict[str, Tensor]:
        """Master weights, moments and step; frozen parameters have a weight only. See Engine.state."""
        tensors: dict[str, Tensor] = {}
        for runner, name, moment, key in self._tensors():
            tensors[key] = global_state.shard_rows(self._whole(runner, name, moment), self._mesh)
        tensors[global_state.STEP] = torch.tensor(float(self._runners[0].updates))
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """See Engine.load_state. The tensors hold exactly the names ``state`` returns."""
        topology = self._topology
        for runner, name, moment, key in self._tensors():
            split = split_of(name, runner.stage.config.decoder)
            whole = global_state.gather(tensors[key])
            runner.put(name, cut(whole, split, topology.tensor_rank, topology.tensor), moment)
        for runner in self._runners:
            runner.updates = int(tensors[global_state.STEP])
            runner.refresh()
        self._not_finite_in_a_row = 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.weights."""
        for runner, names in zip(self._runners, self._names, strict=True):
            for name in names:
                yield names[name], self._whole(runner, name)

    def _tensors(self) -> Iterator[tuple[ShardedStage, str, str | None, str]]:
        """Every tensor of the state: its runner, parameter name, moment (None: the weight) and logical key."""
        for runner, names in zip(self._runners, self._names, strict=True):
            for name, parameter in runner.stage.named_parameters():
                yield runner, name, None, global_state.key(global_state.WEIGHT, names[name])
                for moment in global_state.MOMENTS if parameter.requires_grad else ():
                    yield runner, name, moment, global_state.key(moment, names[name])

    def _whole(self, runner: ShardedStage, name: str, moment: str | None = None) -> Tensor:
        """Master weight or moment of one parameter, whole and float32; collective over the ranks of the stage."""
        local = runner.local(name, moment)
        split = split_of(name, runner.stage.config.decoder)
        if split is None or self._topology.tensor == 1:
            return local
        shares = [torch.empty_like(local) for _ in range(self._topology.tensor)]
        dist.all_gather(shares, local.contiguous(), group=self._topology.tensor_group)
        return join(shares, split)


class _Step:
    """Forward and backward passes of one step on one rank, as the schedule says."""

    def __init__(
        self,
        engine: PipelineEngine,
        microbatches: Sequence[Batch],
        sizes: Sequence[MicrobatchShape],
        scale: float,
        ledger: MaskConsistencyChecker | None,
    ) -> None:
        """``scale`` turns summed losses into what is minimized."""
        self._engine = engine
        self._runners, self._wire, self._topology = engine._runners, engine._wire, engine._topology
        self._microbatches = microbatches
        self._sizes = sizes
        self._scale = scale
        self._ledger = ledger
        self._stages = self._topology.pipeline * len(self._runners)
        self._loss = torch.zeros((), device=self._topology.device)
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        """(chunk, micro-batch) -> the hidden states that came in, None on the first stage, and what came out."""
        self._handed: dict[Message, StageActivations | Tensor] = {}
        """Made by this rank for another stage: to be sent at the end of the tick, or taken by this rank itself."""
        self.max_in_flight = 0

    def run(self) -> Tensor:
        """Do everything; returns the summed loss of this rank's micro-batches, 0 where the head is elsewhere."""
        self._wire.open_step(self._sizes)
        for runner in self._runners:
            runner.begin_step()
        for tick in self._engine._ticks:
            if tick.work is not None:
                self._engine._at(f"waits for {tick.work.kind} {tick.work.micro}")
                (self._forward if tick.work.kind == "forward" else self._backward)(tick.work)
            self._wire.exchange([(message, self._handed.pop(message)) for message in tick.sends], tick.receives)
        self._engine._at("sends")
        self._wire.close_step()
        assert not self._kept and not self._handed
        return self._loss

    def _forward(self, work: Work) -> None:
        runner, stage = self._runners[work.chunk], self._stage(work.chunk)
        hidden = pixels = None
        if stage == 0:
            batch = self._microbatches[work.micro] if self._topology.reads_data else None
            entering = broadcast_batch(batch, self._sizes[work.micro], self._topology)
            inputs, ids, pixels = entering.token_ids, entering.ids, entering.pixels.to(self._engine._dtype)
        else:
            carry = self._wire.take_carry(self._incoming("forward", stage, work.micro))
            inputs, ids = carry.hidden.requires_grad_(), carry.ids
            hidden = inputs
        self._engine._at(f"forward {work.micro}")
        layout = runner.stage.layout(ids)
        if self._ledger is not None:
            self._ledger.record(stage, work.micro, layout, ids)
        output = runner.forward(inputs, ids, pixels, layout)
        self._kept[work.chunk, work.micro] = (hidden, output)
        self.max_in_flight = max(self.max_in_flight, len(self._kept))
        if stage == self._stages - 1:
            self._loss += output.detach()
        else:
            self._hand("forward", stage + 1, work.micro, StageActivations(output.detach(), ids))

    def _backward(self, work: Work) -> None:
        runner, stage = self._runners[work.chunk], self._stage(work.chunk)
        hidden, output = self._kept.pop((work.chunk, work.micro))
        last = work.micro == len(self._sizes) - 1
        gradient = None
        if stage == self._stages - 1:
            output = output * self._scale
        else:
            gradient = self._wire.take_gradient(self._incoming("backward", stage, work.micro))
        self._engine._at(f"backward {work.micro}")
        runner.backward(output, gradient, last=last)
        if hidden is not None:
            assert hidden.grad is not None
            self._hand("backward", stage - 1, work.micro, hidden.grad)

    def _stage(self, chunk: int) -> int:
        return chunk * self._topology.pipeline + self._topology.pipeline_rank

    def _incoming(self, kind: Literal["forward", "backward"], stage: int, micro: int) -> Message:
        """The message for one of this rank's stages."""
        sender = stage - 1 if kind == "forward" else stage + 1
        return Message(kind, stage, micro, sender % self._topology.pipeline)

    def _hand(
        self, kind: Literal["forward", "backward"], stage: int, micro: int, content: StageActivations | Tensor
    ) -> None:
        """Give another stage, which is on another rank, what this one has made."""
        self._handed[Message(kind, stage, micro, stage % self._topology.pipeline)] = content
