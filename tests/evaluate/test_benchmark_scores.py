"""Scores of whole benchmarks: judges, options, what is unknown, missing or broken."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from aki_megatron.evaluate.benchmarks import cvbench, llavabench, mmbench, mme, mmmu, pope
from aki_megatron.evaluate.benchmarks.benchmark import ScoringOptions
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, JudgeUse
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.judges.heuristic import HeuristicJudge
from aki_megatron.evaluate.judges.judge import JudgeError, JudgeRequest

MAR = ScoringOptions()
DETAILS: dict[str, dict[str, Any]] = {
    "MathVista": {"question_type": "free_form", "answer_type": "integer", "answer_option": "", "skills": ["a", "b"]},
    "CV-Bench": {"source": "COCO"},
    "LLaVA-Bench": {"caption": "c"},
}


def predict(benchmark: str, name: str, reply: str, answer: str = "A", **fields: Any) -> Prediction:
    fields = {"details": DETAILS.get(benchmark, {}), **fields}
    return Prediction(BenchmarkQuestion(benchmark, name, "q", answer, **fields), reply)


def score(predictions: Sequence[Prediction], options: ScoringOptions = MAR) -> BenchmarkScore:
    return BENCHMARKS[predictions[0].question.benchmark].score(predictions, options)


class LanguageModel:
    """A judge with one reply for all requests, or a failure."""

    name, is_heuristic = "gpt-x (prompts p)", False

    def __init__(self, reply: str | None) -> None:
        self.reply = reply

    def ask(self, request: JudgeRequest) -> str:
        if self.reply is None:
            raise JudgeError("timed out")
        return self.reply


def judged(reply: str | None) -> ScoringOptions:
    return ScoringOptions(judge=LanguageModel(reply), judge_workers=1)


JUDGED = [
    predict("MM-Vet", "0", "x is 7", "2<AND>7", category="ocr,math"),
    predict("LLaVA-Bench", "0", "a square", "a red square", category="detail"),
    predict("MathVista", "0", "there are 4", "4", category="math word problem"),
]


@pytest.mark.parametrize("prediction", JUDGED, ids=lambda p: p.question.benchmark)
def test_a_heuristic_is_never_a_column_of_the_papers(prediction: Prediction) -> None:
    found = score([prediction], ScoringOptions(judge=HeuristicJudge()))
    assert found.columns == {} and found.judge.is_heuristic
    ((name, value),) = found.others.items()
    assert "heuristic" in name and value is not None
    with pytest.raises(ValueError, match="a heuristic judge cannot give the papers'"):
        replace(found, columns={BENCHMARKS[prediction.question.benchmark].columns[0]: value})


@pytest.mark.parametrize("prediction", JUDGED, ids=lambda p: p.question.benchmark)
def test_without_a_judge_there_is_no_column(prediction: Prediction) -> None:
    found = score([prediction])
    assert list(found.columns.values()) == [None] and "judge" in " ".join(found.notes)


def test_a_name_that_is_no_column_is_refused() -> None:
    with pytest.raises(ValueError, match="no columns"):
        BenchmarkScore("MME", {"MME": 1.0})


def test_a_judge_is_named_with_its_failures() -> None:
    vet, llava, math = JUDGED
    found = score([vet, replace(vet, error="no image")], judged("0.5"))
    assert (found.columns, found.judge) == ({"MM-Vet": 25.0}, JudgeUse("gpt-x (prompts p)", False, 2, 1))
    assert score([vet], judged(None)).columns == {"MM-Vet": 0.0}
    assert score([vet], judged("garbage")).judge.num_failed == 1
    assert score([llava], judged("8 6\nwhy")).columns == {"LLaVA": 75.0}
    failed = score([llava], judged("garbage"))
    assert failed.columns == {"LLaVA": None} and failed.others == {"LLaVA, failures averaged in": 100.0}
    assert failed.judge.num_failed == 1
    assert score([math], judged("4")).columns == {"MathV": 100.0}
    assert score([math], judged(None)).judge.num_failed == 1
    # what the rule reads itself, no judge is asked
    assert score([replace(math, reply="4")], judged(None)).judge.num_asked == 0


def mme_predictions(reply: str = "Yes") -> list[Prediction]:
    return [
        predict("MME", f"{category}{number}", reply, answer, category=category, group=f"{category}.png")
        for category in (*mme.PERCEPTION, *mme.COGNITION)
        for number, answer in enumerate(("Yes", "No"))
    ]


def test_mme_sums_its_subtasks_and_names_what_is_unknown_or_missing() -> None:
    found = score(mme_predictions())
    assert (found.columns, found.num_undecided) == ({"MMEP": 500.0, "MMEC": 200.0}, 0)
    stranger = predict("MME", "s", "Yes", "Yes", category="taste", group="t.png")
    found = score([*mme_predictions(), stranger])
    assert found.columns == {"MMEP": 500.0, "MMEC": 200.0} and "no subtasks of MME: taste" in found.notes[0]
    found = score([p for p in mme_predictions() if p.question.category != "OCR"])
    assert found.columns == {"MMEP": None, "MMEC": 200.0} and "No question of OCR" in found.notes[0]


def test_pope_counts_unknown_as_no_for_f1_and_as_wrong_for_accuracy() -> None:
    replies = [("Yes", "yes"), ("Yes", "no"), ("No", "who knows"), ("No", "no")]
    rows = [predict("POPE", str(n), reply, answer, category="random,x") for n, (answer, reply) in enumerate(replies)]
    found = pope.aggregate(rows, Rules.MAR2025)["Overall"]
    assert (found["acc"], found["precision"], found["recall"], found["n"]) == (50.0, 100.0, 50.0, 8)
    assert abs(found["f1"] - 200 / 3) < 1e-9 and score(rows).columns == {"POPE": found["f1"]}
    assert "no splits of POPE: x" in score(rows).notes[0]


def test_circular_is_at_most_vanilla_and_needs_all_rotations() -> None:
    fields = {"choices": {"A": "cat", "B": "dog"}, "category": "c", "l2_category": "logic_reasoning"}
    rows = [
        predict("MMBench", "7", "A", "A", group="7", **fields),
        predict("MMBench", "1000007", "A", "B", group="7", **fields),
        predict("MMBench", "8", "A", "A", group="8", **fields),
        predict("MMBench", "1000009", "A", "A", group="9", **fields),
    ]
    found = mmbench.aggregate(rows, Rules.MAR2025)
    assert (found["n_questions"], found["circular"]["Overall"], found["vanilla_all_rows"]["Overall"]) == (2, 50.0, 75.0)
    assert found["circular"]["LR"] == 50.0 and "1 questions without their unrotated row" in score(rows).notes[0]


def test_the_versions_of_the_rules_differ_where_the_kit_changed() -> None:
    row = predict("SEED-Bench", "1", "A is what I see in this picture", choices={"A": "cat", "B": "dog"})
    assert score([row]).columns == {"SEED": 100.0}
    assert score([row], ScoringOptions(rules=Rules.HEAD2026)).columns == {"SEED": 0.0}


def test_mmmu_has_two_parsers_and_two_splits() -> None:
    choices = {"A": "cat", "B": "dog"}
    rows = [
        predict(
            "MMMU", "1", "The answer is (A) or rather (B)", "B", choices=choices, split="validation", category="Art"
        ),
        predict("MMMU", "2", "so it is 24.999", "['25', 'x']", split="dev", category="Math"),
        predict("MMMU", "3", "hm", "B", choices=choices, split="dev", category="Art"),
    ]
    kit = score(rows)
    assert (kit.columns, kit.others) == ({"MMMU": 0.0}, {"MMMU dev": 0.0})
    official = ScoringOptions(mmmu_parser="official")
    found = score(rows, official)
    assert found.columns == {"MMMU": 100.0} and "official" in found.parser and found.num_undecided == 1
    assert [score(rows, official) == found for _ in range(5)] == [True] * 5  # letters are drawn from the id
    drawn = {score([predict("MMMU", str(n), "hm", "B", choices=choices, split="dev")], official).others["MMMU dev"]
             for n in range(20)}  # fmt: skip
    assert drawn == {0.0, 100.0}
    assert score(rows[1:]).columns == {"MMMU": None}
    assert mmmu.reference_answers(rows[1].question) == ["25", "x"]


def test_a_category_named_as_its_discipline_replaces_it_in_every_split() -> None:
    fields = {"choices": {"A": "cat", "B": "dog"}, "l2_category": "Science"}
    rows = [predict("MMMU", "1", "A", split="dev", category="Science", **fields),
            predict("MMMU", "2", "A", split="validation", category="Math", **fields)]  # fmt: skip
    found = mmmu.kit_accuracies(mmmu.read_kit(rows, Rules.MAR2025))
    assert found["validation"] == {"Overall": 100.0, "Science": None, "Math": 100.0}


def test_llavabench_is_a_ratio_of_means_and_leaves_nan_out() -> None:
    found = llavabench.aggregate([("conv", (8.0, 4.0)), ("conv", (2.0, 3.0)), ("detail", (5.0, float("nan")))])
    assert (found["conv"]["relative"], found["overall"]["model"], found["overall"]["reference"]) == (70.0, 35.0, 50.0)
    assert llavabench.aggregate([("conv", (0.0, 1.0))])["conv"]["relative"] == float("inf")


def test_cvbench_is_strict_and_a_mean_over_sources() -> None:
    assert abs((cvbench.aggregate(_cv_rows())["acc_2d"] or 0) - 62.1) < 1e-9  # the paper: (60.6 + 63.6) / 2
    choices = {"A": "cat", "B": "dog"}
    rows = [predict("CV-Bench", "2D-1", "A.", choices=choices, split="2D", details={"source": "COCO"}),
            predict("CV-Bench", "2D-2", "A", choices=choices, split="2D", details={"source": "ADE20K"}),
            predict("CV-Bench", "3D-1", "B", choices=choices, split="3D", details={"source": "attic"})]  # fmt: skip
    found = score(rows)
    assert found.columns == {"CV2D": 50.0, "CV3D": None} and found.others["CV2D lenient"] == 100.0
    assert any("no such source: 'attic'" in note for note in found.notes)


def _cv_rows() -> list[tuple[str, bool]]:
    return [("ADE20K", n < 606) for n in range(1000)] + [("COCO", n < 318) for n in range(500)] + [("Omni3D", True)]


def some_prediction(name: str, reply: str) -> Prediction:
    fields: dict[str, Any] = {"category": "c", "group": "1", "split": "validation"}
    if name not in ("MME", "POPE", "LLaVA-Bench", "MM-Vet", "MathVista"):
        fields["choices"] = {"A": "", "B": "dog"}
    return predict(name, "1", reply, **fields)


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("reply", ["", "\x00\ufffe", "A 1 " * 100_000], ids=["empty", "control signs", "huge"])
def test_strange_replies_are_scored(name: str, reply: str) -> None:
    for options in (MAR, ScoringOptions(Rules.HEAD2026, "official", HeuristicJudge())):
        score([some_prediction(name, reply)], options)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_question_that_could_not_be_asked_is_wrong(name: str) -> None:
    broken = replace(some_prediction(name, ""), error="its image is missing")  # the empty option A would match ""
    found = score([broken], ScoringOptions(judge=HeuristicJudge()))
    values = [value for value in (*found.columns.values(), *found.others.values()) if value is not None]
    assert all(value == 0 for value in values)
