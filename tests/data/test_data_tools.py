"""compare_runs, show_batch and the data benchmark do what their help says."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from chat_folders import PHI3_LIKE, chat_folder
from PIL import Image

from aki_megatron.config.load import load_run
from aki_megatron.data.chat import CHATS
from aki_megatron.data.loader import LoadedStep
from aki_megatron.data.pipeline import build_reading, build_tokenizer
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.supervise.run_paths import metrics_line
from aki_megatron.synthetic.dataset import DatasetSize, make_dataset
from aki_megatron.train.sample_audit import SampleAuditCallback
from aki_megatron.types import IGNORE, Modality, StepReport

ROOT = Path(__file__).parents[2]
SFT = ROOT / "configs/demo/sft.yaml"
REPORT = StepReport(
    loss=2.0,
    grad_norm=3.0,
    lr=1e-3,
    supervised_tokens=7,
    tokens=40,
    places=48,
    images=2,
    bad_samples=0,
    seconds=0.5,
    skipped=False,
)


def load(name: str) -> ModuleType:
    """A tool by its path below tools/."""
    path = ROOT / "tools" / name
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare_runs = load("compare_runs.py")
show_batch = load("show_batch.py")


def write_run(
    run: Path,
    steps: int = 5,
    *,
    replicas: int = 1,
    other: int = 0,
    losses: dict[int, float] | None = None,
    seed: int = 1,
) -> Path:
    """A run folder; the step ``other`` has another sample, ``losses`` are those of some steps."""
    loaded: list[LoadedStep] = []
    callbacks = [
        SampleAuditCallback(run / "ledger", lambda: loaded[-1], data_rank=n, data_size=replicas)
        for n in range(replicas)
    ]
    for hook in callbacks:
        hook.on_start(0)
    lines = []
    for step in range(1, steps + 1):
        sums = [2**63 + step * 7919, 2**63 + step + (step == other)]
        for rank, hook in enumerate(callbacks):
            loaded.append(LoadedStep([], sum(sums[rank::replicas]) % 2**64, 8 // replicas, {}))
            hook.after_step(step, REPORT)
        loss = (losses or {}).get(step, 2.0)
        lines.append(metrics_line(step, replace(REPORT, loss=loss, skipped=loss != loss)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.yaml").write_text(
        f"run: {{dir: {run}}}\ntrain: {{seed: {seed}}}\ndata:\n  sources: [{{name: vsr}}]\n"
    )
    return run


def compared(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str]:
    code = compare_runs.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, re.sub(r"\s+", " ", captured.out + captured.err)


def test_equal_runs_are_equal_whatever_their_number_of_replicas(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", replicas=2)
    code, text = compared(capsys, a, b)
    assert code == 0, text
    assert "the same in all 5 steps that both have (40 samples)" in text and "verdict equal" in text
    assert "run.dir: A " in text  # shown, but no difference


def test_the_first_step_with_other_samples_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", replicas=2, other=3)
    code, text = compared(capsys, a, b, "--only", "samples")
    assert code == 1
    assert "part at step 3" in text and "Steps 1 to 2 are the same" in text
    assert "Of the 2 steps after it 2 are the same" in text and "verdict different: samples" in text


def test_a_run_that_ends_earlier_is_different(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", steps=3)
    code, text = compared(capsys, a, b, "--only", "samples")
    assert code == 1 and "same in all 3 steps" in text and "B ends after step 3, the other after 5" in text


def test_metrics_past_the_tolerance(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", losses={2: 2.00001, 4: 2.2})
    code, text = compared(capsys, a, b, "--only", "metrics")
    assert code == 1
    assert "largest relative difference 0.091 at step 4 (A 2, B 2.2); step 4 is the first past 0.0001" in text
    assert "grad_norm equal in all 5 steps" in text
    assert compared(capsys, a, b, "--only", "metrics", "--tolerance", "0.1")[0] == 0
    assert "step 2 is the first past 1e-06" in compared(capsys, a, b, "--only", "metrics", "--tolerance", "1e-6")[1]


def test_a_step_that_only_one_run_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", losses={2: float("nan")})
    code, text = compared(capsys, a, b, "--only", "metrics")
    assert code == 1 and "difference inf at step 2 (A 2, B skipped)" in text
    assert compared(capsys, b, b)[0] == 0


def test_keys_that_differ_and_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=2)
    path = b / "config.yaml"
    path.write_text(path.read_text().replace("{name: vsr}", "{name: vsr, weight: 2}"))
    assert compare_runs.main([str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    config = next(finding for finding in found["findings"] if finding["part"] == "config")
    assert config["figures"] == {"train.seed": [1, 2], "data.sources.0.weight": [None, 2]}
    assert [finding["part"] for finding in found["findings"] if finding["equal"]] == [
        "samples", "loss", "grad_norm", "config",
    ]  # fmt: skip


def test_what_cannot_be_compared_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for path in (b / "ledger").iterdir():
        path.unlink()
    code, text = compared(capsys, a, b)
    assert code == 2 and "has no ledger" in text and "--only" in text
    assert compared(capsys, a, b, "--only", "metrics", "config")[0] == 0
    code, text = compared(capsys, a, tmp_path / "c")
    assert code == 2 and "is not a folder" in text


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo's fine-tuning run over a small set of scenes."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    make_dataset(root, DatasetSize(40, 10, 3), lambda done: None)
    return ["--config", str(SFT), "--data.root", str(root), "--data.tokenizer", str(root / "tokenizer")]


PACKED = [
    "--data.packing.enabled",
    "true",
    "--data.packing.sequence_length",
    "140",
    "--data.packing.buffer_size",
    "100",
]


def test_show_batch_shows_what_the_run_reads(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    asked = ["--step", "2", "--micro", "1", "--row", "3", "--out", str(tmp_path)]
    assert show_batch.main([*flags, *asked]) == 0
    printed = capsys.readouterr().out
    config = load_run(flags, default_config=SFT, prog="", description="")
    reading = build_reading(config, build_tokenizer(config), micro_rows=32)
    plan = next(reading.planner.walk(1)).micros[1]
    sample = reading.planner.phases[0].stream.sample(plan.rows[3][1][0]).sample
    learnt = sum(target != IGNORE for target in sample.targets)
    assert f"{len(sample.token_ids)} real" in printed and f"{learnt} learnt, 1 images of 9 places, 1 samples" in printed
    text = (tmp_path / "step_000002_micro_1_row_3.txt").read_text(encoding="utf-8")
    tokenizer = build_tokenizer(config)
    # no word is lost: the marks taken away, what is left is the decoded text
    answer = re.search(r"<\|assistant\|>\{\+(.*)<\|endoftext\|>\+\}", text)[1]
    response = [t for t, m in zip(sample.token_ids, sample.modality_ids, strict=True) if m == Modality.RESPONSE]
    assert answer.strip() == tokenizer.decode(response).strip()
    assert "<|user|>[image 1: 9 places]" in text
    image = np.asarray(Image.open(tmp_path / "step_000002_micro_1_row_3_image_1.png"))
    assert image.tobytes() == sample.image.rgb


@pytest.mark.parametrize("step", [3, 5])
def test_show_batch_shows_a_packed_row(
    flags: list[str], step: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    asked = ["--step", str(step), "--row", "2", "--out", str(tmp_path)]
    text_first = "[{steps: 3}, {steps: 1597, order: text_first}]"
    phases = ["--data.phases", text_first, "--attention.rule", "causal"]
    assert show_batch.main([*flags, *PACKED, *phases, *asked]) == 0
    printed = capsys.readouterr().out
    config = load_run([*flags, *PACKED, *phases], default_config=SFT, prog="", description="")
    reading = build_reading(config, build_tokenizer(config), micro_rows=32)
    walk = reading.planner.walk(0)
    plan = [next(walk) for _ in range(step)][-1].micros[0]
    assert plan.phase == step // 4 and f"phase {plan.phase + 1} of 2" in printed
    assert ("<|user|>[image" in printed) == (plan.phase == 0)
    numbers = plan.rows[2][1]
    assert len(numbers) > 1 and ", ".join(f"{number:,}" for number in numbers) in printed
    lengths = [int(words) for words in re.findall(r"--- sample \d+ of \d+: (\d+) places ---", printed)]
    assert lengths == [reading.planner.phases[plan.phase].stream.measure(number)[0] for number in numbers]
    assert f"140 places: {sum(lengths)} real" in printed
    assert printed.count("<|endoftext|>+}") == len(numbers)
    assert f"[padding: {140 - sum(lengths)} places]" in printed or sum(lengths) == 140
    assert len(list(tmp_path.glob("*.png"))) == printed.count("[image ") - 1  # the legend has one


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--step", "0"], "--step 0 must lie in 1 ... train.steps=1600"),
        (["--micro", "2"], "--micro 2 must lie in 0 ... 1"),
        (["--row", "32"], "--row 32 must lie in 0 ... 31"),
        (["--data.rooot", "x"], "did you mean --data.root"),
    ],
)
def test_show_batch_refuses_what_the_run_does_not_have(
    flags: list[str], asked: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert show_batch.main([*flags, *asked]) == 2
    assert message in capsys.readouterr().err


def test_bytes_and_spaces_are_made_visible() -> None:
    tokenizer = Tokenizer(PHI3_LIKE, CHATS["phi3"])
    marks = show_batch.Marks.of("utf-8")

    def words(*names: str) -> list[tuple[str, bool]]:
        return list(show_batch.readable(tokenizer, [tokenizer.id(name) for name in names], marks))

    assert words("<s>", "\u2581", "<|end|>") == [("<s>", True), ("\u2423", False), ("<|end|>", True)]
    assert words("<0x0A>") == [("\u23ce\n", False)]
    assert words("<0xC3>", "<0xA9>") == [("\u00e9", False)]
    assert words("<0xC3>") == [("\\xc3", False)]
    assert show_batch.Marks.of("ascii").newline == "\\n\n"


def test_byte_level_tokens_are_read_as_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(chat_folder(tmp_path / "llama", "llama"), CHATS["llama"])
    marks = show_batch.Marks.of("utf-8")
    ids = tokenizer.encode("<|eot_id|> red \u4e16\n\ncat ")
    words = list(show_batch.readable(tokenizer, ids, marks))
    assert "".join(word for word, _ in words) == "<|eot_id|> red\u2423\u4e16\u23ce\n\u23ce\ncat\u2423"
    assert [word for word, special in words if special] == ["<|eot_id|>"] and len(words) < len(ids)


def test_colour_underlines_what_is_learnt_and_nothing_else() -> None:
    tokenizer = Tokenizer(PHI3_LIKE, CHATS["phi3"])
    place, learnt = show_batch.Place, Modality.RESPONSE
    row = [
        place(tokenizer.id("<s>"), Modality.TEXT, 0, False),
        *[place(tokenizer.image, Modality.IMAGE, 0, False)] * 4,
        place(tokenizer.id("\u2581"), learnt, 0, True),
        place(tokenizer.eos, learnt, 0, True),
        *[place(tokenizer.pad, Modality.PAD, -1, False)] * 3,
    ]
    marks = show_batch.Marks.of("utf-8")
    text = show_batch.rendered(row, tokenizer, 2, marks, plain=False)
    assert text.plain == "<s>[image 1: 2 places][image 2: 2 places]\u2423<|endoftext|>\n[padding: 3 places]"
    underlined = [text.plain[span.start : span.end] for span in text.spans if "underline" in str(span.style)]
    assert underlined == ["\u2423", "<|endoftext|>"]
    assert "{+\u2423<|endoftext|>+}" in show_batch.rendered(row, tokenizer, 2, marks, plain=True).plain
    assert show_batch.counts(row, 2) == "10 places: 7 real (70.0%), 2 learnt, 2 images of 2 places, 1 samples"


def test_the_benchmark_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools/bench"))
    tool, out = load("bench/data.py"), tmp_path / "rows.json"
    for name, value in {"SIZE": 16, "PICTURES": 32, "TARS": 4, "BATCH": 2, "MICROS": 2}.items():
        monkeypatch.setattr(tool, name, value)
    small = ["--seconds", "0", "--workers", "0", "1", "--tars", "6", "--per_tar", "30", "--tokenizer", str(PHI3_LIKE)]
    assert tool.main([*small, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    loading = [row for row in rows if row["part"] == "loading"]
    assert [(row["what"], row["workers"]) for row in loading] == [
        (what, workers) for workers in (0, 1) for what in ("ours", "webdataset", "torch files")
    ]
    assert all(row["images_per_core_second"] > 0 and row["turns"] == 2 for row in loading)
    assert loading[0]["ours_over_this"] == 1.0
    assert all(row["real_share"] > 0.95 for row in rows if row["part"] == "packing")
    assert "resume at sample 90 of 180" in rows[-1]["what"] and 0 < rows[-1]["seconds"] < 5
    assert "cores, load" in capsys.readouterr().out
