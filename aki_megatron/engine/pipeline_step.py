"""The passes of one step on one rank, as the pipeline schedule orders them: those of training, or forward alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aki_megatron.engine.base import ShardedStage
from aki_megatron.engine.mask_consistency import MaskConsistencyChecker
from aki_megatron.parallel.batch_broadcast import MicrobatchShape, broadcast_batch
from aki_megatron.parallel.p2p_communication import P2PCommunicator
from aki_megatron.parallel.schedule import Action, Kind, Message, RankSchedule
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, Modality, StageActivations

Mode = Literal["train", "loss", "next_tokens"]
"""What a step computes: gradients; the loss of each micro-batch; or the most likely next tokens. The last two have a
schedule of forward passes alone."""


@dataclass(frozen=True)
class PipelineContext:
    """What all steps of an engine have in common.

    stages         this rank's stages, one per virtual stage
    dtype          of activations and media
    set_phase      is told what this rank does, before it does it
    first_trained  index in the whole model of the first stage with a parameter that trains: backward passes end there
    """

    stages: Sequence[ShardedStage]
    topology: Topology
    communicator: P2PCommunicator
    schedule: RankSchedule
    dtype: torch.dtype
    set_phase: Callable[[str], None]
    first_trained: int = 0
    mode: Mode = "train"

    def is_exchanged(self, message: Message) -> bool:
        """Return whether a message of the schedule is sent: stages below the first that trains get no gradient."""
        return message.kind == "forward" or message.stage >= self.first_trained

    @property
    def num_stages(self) -> int:
        """Stages of the whole model: pipeline x virtual stages."""
        return self.topology.pipeline * len(self.stages)


class PipelineStep:
    """One step. Activations are kept from a micro-batch's forward pass to its backward pass."""

    def __init__(
        self,
        context: PipelineContext,
        microbatches: Sequence[Batch],
        shapes: Sequence[MicrobatchShape],
        loss_scale: float,
        mask_checker: MaskConsistencyChecker | None,
    ) -> None:
        """Prepare the step.

        microbatches  of this replica on the rank that reads data, empty on the others
        loss_scale    factor from summed losses to what is minimized
        mask_checker  records every mask; None: masks are not checked in this step
        """
        self._context = context
        self._microbatches = microbatches
        self._shapes = shapes
        self._loss_scale = loss_scale
        self._mask_checker = mask_checker
        self._loss = torch.zeros((), device=context.topology.device)
        self.outputs: dict[int, Tensor] = {}
        """Micro-batch -> what the LM head returned, on the rank that holds it; empty in training."""
        self._in_flight: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        """(virtual stage, micro-batch) -> hidden states received (None where they need no gradient) and output."""
        self._outgoing: dict[Message, StageActivations | Tensor] = {}
        """Outputs of this rank that the current schedule step sends."""

    def run(self) -> Tensor:
        """Run all passes; return the summed loss of this rank's micro-batches, 0 without the LM head."""
        context = self._context
        context.communicator.begin_step(self._shapes)
        for stage in context.stages:
            stage.begin_step()
        for step in context.schedule:
            if step.action is not None:
                context.set_phase(f"waiting for {step.action.kind} {step.action.microbatch_index}")
                (self._forward if step.action.kind == "forward" else self._backward)(step.action)
            sends = [(message, self._outgoing.pop(message)) for message in filter(context.is_exchanged, step.sends)]
            context.communicator.exchange(sends, list(filter(context.is_exchanged, step.receives)))
        context.set_phase("sending")
        context.communicator.end_step()
        assert not self._in_flight and not self._outgoing
        return self._loss

    def _forward(self, action: Action) -> None:
        context, microbatch_index = self._context, action.microbatch_index
        stage, index = context.stages[action.virtual_stage], self._stage_index(action)
        hidden = None
        media: Mapping[Modality, Tensor] = {}
        if index == 0:
            batch = self._microbatches[microbatch_index] if context.topology.reads_data else None
            first = broadcast_batch(batch, self._shapes[microbatch_index], context.topology)
            inputs, ids = first.token_ids, first.ids
            media = {modality: items.to(context.dtype) for modality, items in first.media.items()}
        else:
            received = context.communicator.wait_activations(self._incoming("forward", index, microbatch_index))
            inputs, ids = received.hidden, received.ids
            if context.mode == "train" and index > context.first_trained:
                hidden = inputs.requires_grad_()
        context.set_phase(f"forward {microbatch_index}")
        mask = stage.module.build_mask(ids)
        if self._mask_checker is not None:
            self._mask_checker.record(index, microbatch_index, mask, ids)
        is_last = index == context.num_stages - 1
        if context.mode == "train":
            with torch.set_grad_enabled(index >= context.first_trained):
                output = stage.forward(inputs, ids, media, mask)
            self._in_flight[action.virtual_stage, microbatch_index] = (hidden, output)
        else:
            output = stage.infer(inputs, ids, media, mask, next_tokens=context.mode == "next_tokens")
        if is_last and context.mode == "train":
            self._loss += output.detach()
        elif is_last:
            self.outputs[microbatch_index] = output
        else:
            self._send("forward", index + 1, microbatch_index, StageActivations(output.detach(), ids))

    def _backward(self, action: Action) -> None:
        context, microbatch_index = self._context, action.microbatch_index
        stage, index = context.stages[action.virtual_stage], self._stage_index(action)
        hidden, output = self._in_flight.pop((action.virtual_stage, microbatch_index))
        if index < context.first_trained:
            return
        gradient = None
        if index == context.num_stages - 1:
            output = output * self._loss_scale
        else:
            gradient = context.communicator.wait_gradient(self._incoming("backward", index, microbatch_index))
        context.set_phase(f"backward {microbatch_index}")
        stage.backward(output, gradient, is_last=microbatch_index == len(self._shapes) - 1)
        if hidden is not None:
            assert hidden.grad is not None
            self._send("backward", index - 1, microbatch_index, hidden.grad)

    def _stage_index(self, action: Action) -> int:
        """Return the index in the whole model of the stage that an action runs."""
        topology = self._context.topology
        return action.virtual_stage * topology.pipeline + topology.pipeline_rank

    def _incoming(self, kind: Kind, stage: int, microbatch_index: int) -> Message:
        """Return the message that stage ``stage`` of this rank receives."""
        sender = stage - 1 if kind == "forward" else stage + 1
        return Message(kind, stage, microbatch_index, sender % self._context.topology.pipeline)

    def _send(self, kind: Kind, stage: int, microbatch_index: int, content: StageActivations | Tensor) -> None:
        """Queue an output for stage ``stage``, which is on another rank."""
        self._outgoing[Message(kind, stage, microbatch_index, stage % self._context.topology.pipeline)] = content
