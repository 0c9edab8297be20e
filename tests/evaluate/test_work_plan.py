"""What is still to be answered, how it is shared, read ahead, and shown."""

import io
import threading
from pathlib import Path

import pytest
from public_files import TABLES, write_tables, write_tsv

from aki_megatron.console import Console
from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmark_folder import forget_errors
from aki_megatron.evaluate.benchmarks.files import QuestionSet, load_questions
from aki_megatron.evaluate.benchmarks.question import (
    BenchmarkQuestion,
    Prediction,
    append_predictions,
    read_predictions,
)
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS
from aki_megatron.evaluate.question_supply import Prepared, QuestionSupply
from aki_megatron.evaluate.run_progress import RunProgress
from aki_megatron.evaluate.work_plan import MAX_BLOCK, WorkPlan, choose_questions, make_plan
from aki_megatron.parallel.shared_store import SharedStore


def question(number: int, group: str = "") -> BenchmarkQuestion:
    return BenchmarkQuestion("POPE", str(number), "Is it?", "Yes", group=group)


def plan_of(count: int, block_size: int) -> WorkPlan:
    return WorkPlan(tuple(map(question, range(count))), count, block_size)


def test_some_questions_are_evenly_spaced_and_groups_stay_together() -> None:
    single = [question(number) for number in range(100)]
    assert choose_questions(single, 0) == single == choose_questions(single, 1000)
    assert [each.id for each in choose_questions(single, 5)] == ["0", "20", "40", "60", "80"]
    grouped = [question(number, group=str(number % 25)) for number in range(100)]
    chosen = choose_questions(grouped, 8)
    assert [each.group for each in chosen] == ["0", "12"] * 4
    assert len(choose_questions(grouped, 1)) == 4, "one group at least"


def test_every_question_is_in_one_block_whoever_claims_it() -> None:
    plan, store = plan_of(23, 4), SharedStore.open_alone()
    claims = [plan.claims(lambda: store.next_number("blocks")) for _ in range(3)]
    claimed: list[list[str]] = [[], [], []]
    for worker in (0, 1, 0, 0, 2, 0, 0, 1, 2):  # a slow one claims little and holds up nobody
        claimed[worker] += [each.id for each in claims[worker]() or ()]
    assert sorted(map(int, sum(claimed, []))) == list(range(23))
    assert [len(each) for each in claimed] == [15, 4, 4] and plan.block(6) is None


def test_a_plan_holds_what_has_no_prediction(tmp_path: Path) -> None:
    tables, out = write_tables(tmp_path / "tables"), tmp_path / "out"
    rows = [{**TABLES["POPE"][0], "index": number} for number in range(900)]
    write_tsv(tables / "POPE.tsv", rows)
    found: list[QuestionSet] = [load_questions(BENCHMARKS[name], [tables]) for name in ("MME", "POPE")]
    settings = {"profile": "table6", "model": "m", "max_new_tokens": 9}
    plan = make_plan(out, found, **settings)
    assert (len(plan.questions), plan.total, plan.block_size) == (902, 902, MAX_BLOCK)
    first, second = plan.questions[:2]
    append_predictions(
        out / "MME/predictions_7.jsonl", [Prediction(second, ""), Prediction(first, "", error="no image")]
    )
    plan = make_plan(out, found, **settings, per_benchmark=10, num_workers=4)
    assert (len(plan.questions), plan.total, plan.num_answered_before, plan.block_size) == (10, 12, 2, 1)
    assert forget_errors(out) == 1 and read_predictions(out / "MME") == [Prediction(second, "")]
    assert make_plan(out, found, **settings).questions[0] == first
    with pytest.raises(DataError, match="max_new_tokens was 9, now 8"):
        make_plan(out, found, **settings | {"max_new_tokens": 8})


def test_prompts_are_read_ahead_in_order_and_no_further_than_asked() -> None:
    plan, may_read, read = plan_of(40, 4), threading.Event(), set[str]()
    numbers = iter(range(100))

    def read_slowly(each: BenchmarkQuestion) -> Prepared:
        assert may_read.wait(300)
        read.add(each.id)
        return Prepared(each, None, "refused")

    supply = QuestionSupply(plan.claims(lambda: next(numbers)), read_slowly, num_threads=3, num_ahead=6)
    try:
        assert supply.take(5, wait=False) == [] and next(numbers) == 2, "two blocks of four hold six questions"
        may_read.set()
        taken: list[str] = []
        while (got := supply.take(5, wait=True)) is not None:
            assert len(got) <= 5
            taken += [each.question.id for each in got]
    finally:
        supply.close()
    assert taken == [str(number) for number in range(40) if not 8 <= number < 12], "block 2 went to another"
    assert read == set(taken)


def test_progress_is_a_line_now_and_then_with_rate_and_time_left() -> None:
    out, now = io.StringIO(), [100.0]
    progress = RunProgress(1000, 100, Console(out, width=200), line_seconds=10, clock=lambda: now[0])
    for second in range(1, 61):
        now[0] += 1
        progress.show(5 * second, 3 if second > 25 else 0, "MME")
    progress.finish(900, 3)
    lines = out.getvalue().splitlines()
    assert lines[0] == "answered 150 of 1,000  5.00 answers/s  time left 0:02:50  MME"
    assert lines[2] == "answered 250 of 1,000  5.00 answers/s  time left 0:02:30  MME  3 could not be asked"
    assert len(lines) == 7
    assert lines[-1] == (
        "answered 1,000 of 1,000 questions: 900 in 0:01:00, 15.00 answers/s; 3 of them could not be asked"
    )
