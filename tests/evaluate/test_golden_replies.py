"""The scorers give the recorded verdicts of the public code on made-up replies, and a changed verdict is noticed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aki_megatron.errors import DataError
from aki_megatron.evaluate.extraction.choice import extract_choice
from aki_megatron.evaluate.extraction.mmmu_official import parse_open
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.extraction.yes_no import extract_yes_no
from aki_megatron.evaluate.golden_replies import CHECKS, check_file, check_folder, check_name

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/evaluation"


@pytest.mark.parametrize("name", CHECKS)
def test_every_recorded_verdict_is_reproduced(name: str) -> None:
    found = check_file(GOLDEN / f"{name}.jsonl")
    assert found.num_cases > 1 and found.mismatches == ()


def first_number_changed(value: object) -> bool:
    """Change the first verdict that is found in a recorded value; whether there is one."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, bool | int | float):
            value[key] = not item if isinstance(item, bool) else item + 2e-6  # type: ignore[index]
            return True
        if first_number_changed(item):
            return True
    return False


@pytest.mark.parametrize("name", CHECKS)
def test_a_changed_verdict_is_noticed(name: str, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text().splitlines()[:2]]
    assert first_number_changed(lines[1]["expected"])
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = check_file(tmp_path / f"{name}.jsonl")
    assert found.num_cases == 2 and len(found.mismatches) == 1 and lines[1]["id"] in found.mismatches[0]


def test_a_missing_and_an_additional_value_are_mismatches(tmp_path: Path) -> None:
    case = json.loads((GOLDEN / "cvbench.jsonl").read_text().splitlines()[0])
    for expected in ({**case["expected"], "more": 1}, {"gold": case["expected"]["gold"]}):
        (tmp_path / "cvbench.jsonl").write_text(json.dumps({**case, "expected": expected}))
        assert len(check_file(tmp_path / "cvbench.jsonl").mismatches) == 1


def test_a_further_set_may_have_a_suffix() -> None:
    assert [check_name(Path(f"{stem}.jsonl")) for stem in ("mcq", "mmmu_kit-2", "table_mmmu_kit_b", "mcqs", "x")] == [
        "mcq", "mmmu_kit", "table_mmmu_kit", "", "",
    ]  # fmt: skip


def test_folders_without_cases_and_cases_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file of golden replies; known are yesno.jsonl"):
        check_folder(tmp_path)
    (tmp_path / "yesno.jsonl").write_text('{"id": "x"}\n')
    with pytest.raises(DataError, match=r"yesno.jsonl:1 is no case of this file \(KeyError: 'prediction'\)"):
        check_folder(tmp_path)


def test_the_command_prints_cases_and_mismatches_and_needs_no_torch(tmp_path: Path) -> None:
    for name in ("yesno", "table_mme"):
        shutil.copy(GOLDEN / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    (tmp_path / "other.jsonl").write_text("{}\n")
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, 'tools'); "
        "import evaluate; sys.exit(evaluate.main())"
    )
    command = [sys.executable, "-c", program, "evaluate.py", "golden", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["table_mme.jsonl", "2", "cases", "0", "mismatches"],
        ["yesno.jsonl", "150", "cases", "0", "mismatches"],
        ["other.jsonl:", "not", "checked,", "no", "scorer", "has", "this", "name"],
        ["all", "152", "cases", "0", "mismatches"],
    ]


def test_refusals_and_failures_of_an_api_are_recognised() -> None:
    choices = {"A": "cat", "B": "dog"}
    assert extract_choice("Sorry, I can't help with images of people yet. A", choices) == "Z"
    assert extract_choice("Failed to obtain answer via API. A", choices) is None
    assert extract_choice("Failed to obtain answer via API. a dog", choices) == "B"


def test_huge_replies_are_read_in_linear_time() -> None:
    for text in ("1" * 300_000, "1.5e" * 80_000, "(A) " * 80_000, "answer is " * 40_000, "-," * 150_000):
        for rules in Rules:
            extract_choice(text, {"A": "cat"}, rules)
            extract_yes_no(text, rules)
        parse_open(text)
