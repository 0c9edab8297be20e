"""Validation while training: losses and answers of samples that are not trained on, by the engine that trains.

A validation runs in rounds of forward passes. Before each round all ranks agree on whether any has work left and
whether any was asked to stop, so that a stop comes within a round. Nothing that training uses is changed: weights,
optimizer state, data state and random generators stay, so that losses are bit-equal with and without validation.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from aki_megatron.data.loader import EmptyStepLoader, StepLoader
from aki_megatron.data.validation_set import ValidationSet
from aki_megatron.engine.base import Engine
from aki_megatron.supervise.progress import VALIDATING
from aki_megatron.supervise.validations import SourceValidation, ValidationReport
from aki_megatron.train.best_checkpoint import BestCheckpoint
from aki_megatron.train.validation_answers import AnswerCounts, ValidationQuestions
from aki_megatron.types import NO_SEGMENT, Batch, ControlRequest

logger = logging.getLogger("aki_megatron.train")

LOSS, TOKENS, SAMPLES, BAD_SAMPLES, QUESTIONS, CORRECT = range(6)
"""Columns of the sums of a source."""


class Validator:
    """Decide when to validate, and do it; on every rank, collectively."""

    def __init__(
        self,
        engine: Engine,
        names: Sequence[str],
        *,
        interval: int,
        steps: int,
        at_start: bool,
        validation_set: ValidationSet | None,
        questions: ValidationQuestions | None,
        best: BestCheckpoint | None,
        settings: str,
        sum_over_world: Callable[[Sequence[float]], list[float]],
        poll_control: Callable[[], ControlRequest],
        set_phase: Callable[[str], None],
    ) -> None:
        """
        names           of the sources, the same on every rank
        interval        steps between validations; the last of the run's ``steps`` is validated too
        at_start        whether to validate before the first step
        validation_set  what this rank reads; None on ranks that read no data
        questions       to be answered; None: none
        best            on rank 0 of a run that keeps its best checkpoint; None elsewhere
        settings        identifies what is validated on: losses of other settings are not compared
        sum_over_world  sums numbers over all ranks; collective
        poll_control    returns what this rank is asked for
        set_phase       told that this rank validates
        """
        self._engine = engine
        self._names = names
        self._interval = interval
        self._steps = steps
        self._at_start = at_start
        self._set = validation_set
        self._questions = questions
        self._best = best
        self._settings = settings
        self._sum_over_world = sum_over_world
        self._poll_control = poll_control
        self._set_phase = set_phase
        self._last_step = -1
        """The last step that was validated."""

    def is_due(self, step: int) -> bool:
        """Return whether to validate after ``step`` steps: also one whose validation a stop has left out."""
        if step <= self._last_step:
            return False
        return self._at_start if step == 0 else step % self._interval == 0 or step == self._steps

    def run(self, step: int, *, is_saved_next: bool = True) -> ValidationReport | None:
        """Validate after ``step`` steps; None when a rank was asked to stop meanwhile. Collective.

        is_saved_next  whether the step can be saved as the best one

        Raises BadSampleBudgetExceeded on a rank that cannot read too many of its samples.
        """
        started = time.monotonic()
        self._set_phase(VALIDATING)  # to plan a packed validation takes long the first time
        sums = torch.zeros(len(self._names), 6, dtype=torch.float64)
        with torch.random.fork_rng(devices=[]):  # torch's DataLoader draws a seed
            answers = self._measure(sums)
        if answers is None:
            return None
        self._set_phase(VALIDATING)
        sums = torch.tensor(self._sum_over_world(sums.flatten().tolist()), dtype=torch.float64).view_as(sums)
        report = self._report(sums, answers, time.monotonic() - started)
        is_best = self._best is not None and self._best.update(step, report.loss, is_saved_next=is_saved_next)
        (num_best,) = self._sum_over_world([float(is_best)])
        self._set_phase(VALIDATING)
        self._last_step = step
        return ValidationReport(report.sources, report.bad_samples, report.seconds, is_best=num_best > 0)

    def best_step(self, step: int) -> int | None:
        """Return the step that ``best`` is to name once the checkpoint of ``step`` is complete; None on other ranks."""
        return self._best.step_after_save(step) if self._best else None

    def state_dict(self, step: int) -> dict[str, Any]:
        """Return the state that the checkpoint of ``step`` holds; rank 0's is complete."""
        best = self._best.state_dict(step) if self._best else None
        return {"last_step": self._last_step, "settings": self._settings, "best": best}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from the state in a checkpoint; None for one that was saved without validation."""
        self._last_step = int(state["last_step"]) if state else -1
        if self._best:
            comparable = state is not None and state["settings"] == self._settings
            self._best.load_state_dict(state["best"] if state is not None and comparable else None)

    def _measure(self, sums: torch.Tensor) -> list[AnswerCounts] | None:
        """Add to the sums of each source what this rank reads; return its answers; None when asked to stop."""
        if not self._measure_losses(sums):
            return None
        if self._questions is None:
            return [AnswerCounts() for _ in self._names]
        self._set_phase(VALIDATING)
        answers = self._questions.answer(self._engine.next_tokens, self._agree)
        for source, counts in enumerate(answers or []):
            sums[source, BAD_SAMPLES] += counts.bad_samples
            sums[source, QUESTIONS] += counts.questions
            sums[source, CORRECT] += counts.correct
        return answers

    def _measure_losses(self, sums: torch.Tensor) -> bool:
        """Add the losses of what this rank reads; return False when asked to stop."""
        plans = self._set.planner.plans if self._set else []
        loader = self._set.open_loader() if self._set else EmptyStepLoader()
        try:
            rounds = loader.steps(0)
            number = 0
            while goes_on := self._agree(number < len(plans)):
                batches = next(rounds).batches
                losses = self._engine.forward_losses(batches, check_masks=number == 0)
                if self._set is not None:
                    for plan, batch, loss in zip(plans[number].microbatches, batches, losses, strict=True):
                        sums[plan.phase] += _row(batch, loss)
                number += 1
            self._log_bad_samples(loader)
        finally:
            loader.close()
        return goes_on is not None

    def _log_bad_samples(self, loader: StepLoader | EmptyStepLoader) -> None:
        if isinstance(loader, StepLoader) and (summary := loader.bad_sample_budget.summary()):
            logger.warning("validation: %s", summary)

    def _agree(self, has_more: bool) -> bool | None:
        """Return whether any rank has work left; None when one was asked to stop. Collective."""
        self._set_phase(VALIDATING)
        wants_stop = ControlRequest.STOP in self._poll_control()
        more, stops = self._sum_over_world([float(has_more), float(wants_stop)])
        return None if stops else more > 0

    def _report(self, sums: torch.Tensor, answers: Sequence[AnswerCounts], seconds: float) -> ValidationReport:
        sources = {}
        for name, row, answer in zip(self._names, sums.tolist(), answers, strict=True):
            tokens = int(row[TOKENS])
            sources[name] = SourceValidation(
                loss=row[LOSS] / tokens if tokens else float("nan"),
                supervised_tokens=tokens,
                samples=int(row[SAMPLES]),
                questions=int(row[QUESTIONS]),
                correct=int(row[CORRECT]),
                example=answer.example,
            )
        return ValidationReport(sources, int(sums[:, BAD_SAMPLES].sum()), seconds)


def _row(batch: Batch, loss: float) -> torch.Tensor:
    """Return what one micro-batch adds to the sums of its source."""
    # segments are numbered from 0 in every sequence
    samples = int((batch.segment_ids.amax(dim=1) - NO_SEGMENT).sum())
    return torch.tensor([loss, batch.supervised_tokens, samples, batch.num_bad_samples, 0, 0], dtype=torch.float64)
