"""Answer the questions of benchmarks with one or several processes, and know when all have been answered.

Rank 0 makes the plan, shows the progress of all, and decides that the run has ended. Every answer is in a file before
the next is awaited; what a process had in its batch when it was killed is answered by the next start.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import DistError

from aki_megatron.errors import DataError
from aki_megatron.evaluate.answer_loop import AnswerSettings, TensorRanks, answer_questions
from aki_megatron.evaluate.answering import Answerer
from aki_megatron.evaluate.benchmarks.question import Prediction, append_predictions
from aki_megatron.evaluate.model_loading import LoadedModel
from aki_megatron.evaluate.prompts import PromptProfile
from aki_megatron.evaluate.question_supply import PromptReader, QuestionSupply
from aki_megatron.evaluate.run_progress import RunProgress
from aki_megatron.evaluate.work_plan import WorkPlan
from aki_megatron.parallel.shared_store import SharedStore

STATUS_SECONDS = 2.0
"""Between two statuses of a process."""

LOST_SECONDS, LOADING_SECONDS = 300.0, 3600.0
"""A process that says nothing for so long is lost; before its first answer it may be loading the model."""

PLAN, END, BLOCKS = "plan", "end", "blocks"
"""Names in the shared store."""


@dataclass(frozen=True)
class WorkerSettings:
    """How a process answers.

    worker       number of the model that this process holds, or holds a part of
    num_workers  models in all
    threads      that read and decode images
    """

    folder: Path
    profile: PromptProfile
    max_new_tokens: int
    batch_size: int
    worker: int = 0
    num_workers: int = 1
    threads: int = 4

    def predictions_file(self, benchmark: str) -> Path:
        """Where this worker writes its answers."""
        name = "predictions.jsonl" if self.num_workers == 1 else f"predictions_{self.worker}.jsonl"
        return self.folder / benchmark / name


@dataclass
class Tally:
    """What a process has answered since it started."""

    answered: int = 0
    errors: int = 0
    first_errors: list[str] = field(default_factory=list)
    benchmark: str = ""

    def add(self, predictions: Sequence[Prediction]) -> None:
        """Count answers that are in their file."""
        for prediction in predictions:
            self.answered += 1
            self.errors += bool(prediction.error)
            if prediction.error and len(self.first_errors) < 3:
                self.first_errors.append(prediction.error)
            self.benchmark = prediction.question.benchmark


class Worker:
    """One process of a run."""

    def __init__(
        self,
        plan: WorkPlan,
        settings: WorkerSettings,
        store: SharedStore,
        *,
        progress: RunProgress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the worker.

        progress  on rank 0: what shows the progress of all
        check     called after every token; raises to end the work
        """
        self.tally = Tally()
        self._plan, self._settings, self._store = plan, settings, store
        self._progress, self._check = progress, check
        self._next_status = 0.0
        self._num_statuses = 0
        self._seen: dict[int, tuple[int, float]] = {}

    def answer(self, model: LoadedModel, ranks: TensorRanks) -> None:
        """Claim and answer questions until none is left."""
        settings = self._settings
        tokenizer = model.template.tokenizer
        answerer = Answerer(model.stage, tokenizer, max_sequences=settings.batch_size)
        supply = QuestionSupply(
            self._plan.claims(lambda: self._store.next_number(BLOCKS)),
            PromptReader(model.template, settings.profile, model.media_decoders()),
            num_threads=settings.threads,
            num_ahead=self._num_ahead(),
        )
        answers = AnswerSettings(settings.profile.name, settings.max_new_tokens, settings.batch_size)
        try:
            answer_questions(answerer, supply, answers, self._on_answers, ranks)
        finally:
            supply.close()

    def _num_ahead(self) -> int:
        """Return how many prompts to read ahead: a batch, but of few questions not the share of others."""
        share = -(-len(self._plan.questions) // (2 * self._settings.num_workers))
        return min(self._settings.batch_size + self._settings.threads, share)

    def finish(self) -> bool:
        """Wait on rank 0 until all have ended or are lost; return whether every question is answered."""
        self._report(ended=True)
        if self._progress is None:
            return True
        while self._find_working():
            self._check()
            self._show()
            time.sleep(min(0.2, STATUS_SECONDS))
        answered, errors = self._totals()
        self._progress.finish(answered, errors)
        return answered >= len(self._plan.questions)

    def _on_answers(self, predictions: Sequence[Prediction]) -> None:
        self._check()
        by_benchmark: dict[str, list[Prediction]] = defaultdict(list)
        for prediction in predictions:
            by_benchmark[prediction.question.benchmark].append(prediction)
        for name, group in by_benchmark.items():
            append_predictions(self._settings.predictions_file(name), group)
        self.tally.add(predictions)
        if time.monotonic() >= self._next_status:
            self._report()
            self._show()

    def _report(self, *, ended: bool = False) -> None:
        self._next_status = time.monotonic() + STATUS_SECONDS
        self._num_statuses += 1
        tally = self.tally
        self._store.set_status(
            {
                "number": self._num_statuses,
                "answered": tally.answered,
                "errors": tally.errors,
                "benchmark": tally.benchmark,
                "ended": ended,
            }
        )

    def _show(self) -> None:
        if self._progress is not None:
            self._progress.show(*self._totals(), self.tally.benchmark)

    def _totals(self) -> tuple[int, int]:
        """Return the questions that all have answered, and those of them that could not be asked."""
        statuses = self._store.statuses()
        return sum(each.get("answered", 0) for each in statuses), sum(each.get("errors", 0) for each in statuses)

    def _find_working(self) -> bool:
        """Return whether another process still works; one that has said nothing for long does not."""
        now = time.monotonic()
        working = False
        for rank, status in enumerate(self._store.statuses()):
            number = status.get("number", 0)
            if status.get("ended"):
                continue
            before, since = self._seen.get(rank, (-1, now))
            if number != before:
                since = now
                self._seen[rank] = (number, now)
            working |= now - since < (LOST_SECONDS if number else LOADING_SECONDS)
        return working


def share_plan(store: SharedStore, make: Callable[[], WorkPlan]) -> WorkPlan:
    """Make the plan on rank 0 and return it on every process.

    Raises what ``make`` raises on rank 0, and DataError on the others then.
    """
    if store.rank == 0:
        try:
            plan = make()
        except BaseException as error:
            store.publish(PLAN, str(error) or type(error).__name__)
            raise
        store.publish(PLAN, plan)
        return plan
    try:
        received = store.receive(PLAN)
    except DistError as error:
        raise DataError("rank 0 has ended before it told what to answer; its message says why.") from error
    if not isinstance(received, WorkPlan):
        raise DataError(f"rank 0 cannot begin: {received}")
    return received


def end_together(store: SharedStore) -> None:
    """Wait until rank 0 has published END: launchers end all processes soon after the first has ended."""
    try:
        if store.rank == 0:
            store.publish(END, True)
        else:
            store.receive(END)
    except DistError:
        pass  # rank 0 has ended, and so may this process
    store.leave()
