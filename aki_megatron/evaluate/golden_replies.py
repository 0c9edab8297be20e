"""Compare the scorers with folders of made-up replies and the public code's verdicts on them.

A folder holds files of one JSON object a line, named as in tests/golden/evaluation/README.md, which describes them:
parsers (yesno, mcq, mmbench_groups, mmmu_kit, mmmu_official, mathvista, cvbench, mmvet, llavabench) and whole tables
(table_...). Any file may be missing.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks import cvbench, llavabench, mathvista, mmbench, mmmu, mmvet
from aki_megatron.evaluate.benchmarks.choice_scoring import Choice, read_choice
from aki_megatron.evaluate.benchmarks.question import Prediction
from aki_megatron.evaluate.extraction.choice import extract_choice
from aki_megatron.evaluate.extraction.mmmu_official import parse_choice, parse_open
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.extraction.yes_no import extract_yes_no
from aki_megatron.evaluate.golden_tables import TABLES, by_rules, mathvista_question, to_prediction
from aki_megatron.evaluate.jsonl import read_lines
from aki_megatron.evaluate.judges.judging import first_usable

TOLERANCE = 1e-6
"""Scores are recorded with ten decimals."""

Case = Mapping[str, Any]


@dataclass(frozen=True)
class GoldenFile:
    """What a file of cases gave; a mismatch names the case, the expected and the found value."""

    path: Path
    num_cases: int
    mismatches: tuple[str, ...]


def check_folder(folder: Path) -> list[GoldenFile]:
    """Check every known file of a folder. Raises DataError where it has none, and for a case of another form."""
    paths = sorted(path for path in folder.glob("*.jsonl") if check_name(path))
    if not paths:
        names = ", ".join(f"{name}.jsonl" for name in CHECKS)
        raise DataError(f"{folder} holds no file of golden replies; known are {names}.")
    return [check_file(path) for path in paths]


def unknown_files(folder: Path) -> list[Path]:
    """Return the files of cases that no check is known for."""
    return sorted(path for path in folder.glob("*.jsonl") if not check_name(path))


def check_name(path: Path) -> str:
    """Return which check a file is for: its name is the check's, or begins with it (mcq-2.jsonl); "" for none."""
    found = [name for name in CHECKS if path.stem == name or path.stem.startswith((f"{name}-", f"{name}_", f"{name}."))]
    return max(found, key=len, default="")


def check_file(path: Path) -> GoldenFile:
    """Check every case of a file."""
    check = CHECKS[check_name(path)]
    num_cases, mismatches = 0, []
    for number, case in read_lines(path):
        num_cases += 1
        try:
            found, expected = check(case), _restored(case["expected"])
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}:{number} is no case of this file ({type(error).__name__}: {error}).") from error
        for where, wanted, got in _differences(expected, found, ""):
            mismatches.append(f"{case.get('id', number)}{where}: expected {_short(wanted)}, found {_short(got)}")
    return GoldenFile(path, num_cases, tuple(mismatches))


def _restored(value: Any) -> Any:
    """Return a recorded value with its non-finite numbers, which are written ``{"float": "nan"}``."""
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {k: _restored(v) for k, v in value.items()}
    return [_restored(item) for item in value] if isinstance(value, list) else value


def _differences(expected: Any, found: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, expected, found) of all that is not recorded and found alike."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in {**expected, **found}:
            if key not in found or key not in expected:
                yield f"{where}/{key}", expected.get(key, "nothing"), found.get(key, "nothing")
            else:
                yield from _differences(expected[key], found[key], f"{where}/{key}")
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            yield from _differences(one, other, f"{where}/{number}")
    elif not _equal(expected, found):
        yield where, expected, found


def _equal(expected: Any, found: Any) -> bool:
    numbers = int | float  # bool is an int: a hit is recorded as true or as 1
    if isinstance(expected, numbers) and isinstance(found, numbers):
        if math.isfinite(expected) and math.isfinite(found):
            return abs(expected - found) <= TOLERANCE
        return expected == found or (math.isnan(expected) and math.isnan(found))
    return type(expected) is type(found) and bool(expected == found)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _yes_no(case: Case) -> Any:
    def find(rules: Rules) -> Any:
        extracted = extract_yes_no(case["prediction"], rules)
        return {"extracted": extracted, "hit": extracted == case["answer"]}

    return by_rules(find)


def _choice(case: Case) -> Any:
    def find(rules: Rules) -> Any:
        extracted = extract_choice(case["prediction"], case["options"] or {}, rules)
        return {"extracted": extracted, "hit": extracted == case["answer"]}

    return by_rules(find)


def _mmbench_group(case: Case) -> Any:
    def find(rules: Rules) -> Any:
        choices = [read_choice(to_prediction(row), rules) for row in case["rows"]]
        return {
            "circular_hit": mmbench.all_right(choices),
            "row_extracted": [choice.extracted for choice in choices],
            "row_hits": [choice.is_hit for choice in choices],
        }

    return by_rules(find)


def _mmmu_kit(case: Case) -> Any:
    prediction = to_prediction(case)

    def find(rules: Rules) -> Any:
        choice: Choice = mmmu.read_kit([prediction], rules)[0]
        made = mmmu.kit_choices(prediction.question.choices, prediction.question.answer)
        return {
            "gold": choice.answer,
            "choices": None if prediction.question.choices else dict(made),
            "extracted": choice.extracted,
            "hit": choice.is_hit,
        }

    return by_rules(find)


def _mmmu_official(case: Case) -> Any:
    reply, answers = case["prediction"], case["answer"]
    if case["question_type"] != "multiple-choice":
        parsed = parse_open(reply)
        hit, is_drawn = mmmu.official_hit(reply, None, answers, None)
        return {"parsed": _ordered_as(parsed, case["expected"]["parsed"]), "random_fallback": is_drawn, "hit": hit}
    options = case["options"] or {}
    hit, is_drawn = mmmu.official_hit(reply, options, answers, random.Random(42))
    letter = parse_choice(reply, options)
    if letter is None and options:
        letter = random.Random(42).choice(list(options))
    return {"parsed": letter, "random_fallback": is_drawn, "hit": hit}


def _ordered_as(values: Sequence[str | float], recorded: Any) -> list[str | float]:
    """Return the values in the recorded order, where they are the same ones: the order means nothing."""
    restored = _restored(recorded)

    def order(items: Sequence[str | float]) -> list[str]:
        return sorted(repr(item if isinstance(item, str) else float(item)) for item in items)

    return list(restored) if isinstance(restored, list) and order(restored) == order(values) else list(values)


def _mathvista(case: Case) -> Any:
    question = mathvista_question(case)
    prediction = Prediction(question, case["prediction"])

    def find(rules: Rules) -> Any:
        value = mathvista.prefetch(question, prediction.reply, rules)
        outcome = mathvista.outcome(prediction, rules)
        given = mathvista.is_hit(question, case["extraction"], rules)
        return {
            "prefetch": value,
            "prefetched": outcome.is_prefetched,
            "hit_no_llm": outcome.is_hit,
            "hit_given_extraction": given,
        }

    return by_rules(find)


def _cvbench(case: Case) -> Any:
    gold = cvbench.letter_of(case["answer"])
    return {"gold": gold, "hit": cvbench.is_strict_hit(case["prediction"], gold)}


def _mmvet(case: Case) -> Any:
    judgement = first_usable(case["judge_replies"], mmvet.read_grade)
    score = mmvet.grade_of(judgement)
    return {"score": score, "succeeded": judgement.value is not None, "replies_used": judgement.tries}


def _llavabench(case: Case) -> Any:
    grades = llavabench.read_grades(case["judge_reply"])
    reference, model = grades or llavabench.FAILED
    return {"reference_score": reference, "model_score": model, "parse_failed": grades is None}


CHECKS: dict[str, Callable[[Case], Any]] = {
    "yesno": _yes_no,
    "mcq": _choice,
    "mmbench_groups": _mmbench_group,
    "mmmu_kit": _mmmu_kit,
    "mmmu_official": _mmmu_official,
    "mathvista": _mathvista,
    "cvbench": _cvbench,
    "mmvet": _mmvet,
    "llavabench": _llavabench,
    **TABLES,
}
"""File name without the ending -> what is computed of a case, under the names of its recorded values."""
