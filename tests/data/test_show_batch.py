"""show_batch shows what a run reads."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from chat_folders import PHI3_LIKE, chat_folder
from PIL import Image

from aki_megatron.config.load import load_run
from aki_megatron.data.pipeline import build_data_pipeline, build_tokenizer
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.families.registry import FAMILIES
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset
from aki_megatron.types import IGNORE, Modality

ROOT = Path(__file__).parents[2]
SFT = ROOT / "configs/demo/sft.yaml"


def load(name: str) -> ModuleType:
    """Import a tool by its path below tools/."""
    path = ROOT / "tools" / name
    spec = importlib.util.spec_from_file_location(f"tool_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


show_batch = load("show_batch.py")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The demo's fine-tuning run over a small set of scenes."""
    root = tmp_path_factory.mktemp("scenes") / "data"
    write_dataset(root, DatasetSize(40, 10, 3), lambda done: None)
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
    arguments = ["--step", "2", "--microbatch", "1", "--sequence", "3", "--out", str(tmp_path)]
    assert show_batch.main([*flags, *arguments]) == 0
    printed = capsys.readouterr().out
    config = load_run(flags, default_config=SFT, prog="", description="")
    pipeline = build_data_pipeline(config, build_tokenizer(config), micro_batch_size=32)
    plan = next(pipeline.planner.plan_steps(1)).microbatches[1]
    sample = pipeline.planner.phases[0].stream.sample(plan.sequences[3][1][0]).sample
    supervised = sum(target != IGNORE for target in sample.targets)
    assert f"{len(sample.token_ids)} real" in printed
    assert f"{supervised} supervised, 1 images of 9 positions, 1 samples" in printed
    text = (tmp_path / "step_000002_microbatch_1_sequence_3.txt").read_text(encoding="utf-8")
    tokenizer = build_tokenizer(config)
    # nothing is lost: without the marks it is the decoded text
    answer = re.search(r"<\|assistant\|>\{\+(.*)<\|endoftext\|>\+\}", text)[1]
    response = [t for t, m in zip(sample.token_ids, sample.modality_ids, strict=True) if m == Modality.RESPONSE]
    assert answer.strip() == tokenizer.decode(response).strip()
    assert "<|user|>[image 1: 9 positions]" in text
    image = np.asarray(Image.open(tmp_path / "step_000002_microbatch_1_sequence_3_image_1.png"))
    assert image.tobytes() == sample.images[0].rgb


@pytest.mark.parametrize("step", [3, 5])
def test_show_batch_shows_a_packed_sequence(
    flags: list[str], step: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--step", str(step), "--sequence", "2", "--out", str(tmp_path)]
    text_first = "[{steps: 3}, {steps: 1597, order: text_first}]"
    phases = ["--data.phases", text_first, "--attention.rule", "causal"]
    assert show_batch.main([*flags, *PACKED, *phases, *arguments]) == 0
    printed = capsys.readouterr().out
    config = load_run([*flags, *PACKED, *phases], default_config=SFT, prog="", description="")
    pipeline = build_data_pipeline(config, build_tokenizer(config), micro_batch_size=32)
    plans = pipeline.planner.plan_steps(0)
    plan = [next(plans) for _ in range(step)][-1].microbatches[0]
    assert plan.phase == step // 4 and f"phase {plan.phase + 1} of 2" in printed
    assert ("<|user|>[image" in printed) == (plan.phase == 0)
    numbers = plan.sequences[2][1]
    assert len(numbers) > 1 and ", ".join(f"{number:,}" for number in numbers) in printed
    lengths = [int(length) for length in re.findall(r"--- sample \d+ of \d+: (\d+) positions ---", printed)]
    assert lengths == [pipeline.planner.phases[plan.phase].stream.length(number)[0] for number in numbers]
    assert f"140 positions: {sum(lengths)} real" in printed
    assert printed.count("<|endoftext|>+}") == len(numbers)
    assert f"[padding: {140 - sum(lengths)} positions]" in printed or sum(lengths) == 140
    assert len(list(tmp_path.glob("*.png"))) == printed.count("[image ") - 1  # the legend has one


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0"], "--step 0 must lie in 1 ... train.steps=1600"),
        (["--microbatch", "2"], "--microbatch 2 must lie in 0 ... 1"),
        (["--sequence", "32"], "--sequence 32 must lie in 0 ... 31"),
        (["--data.rooot", "x"], "did you mean --data.root"),
    ],
)
def test_show_batch_refuses_what_the_run_does_not_have(
    flags: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert show_batch.main([*flags, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bytes_and_spaces_are_visible() -> None:
    tokenizer = Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat)
    marks = show_batch.Marks.of("utf-8")

    def texts(*names: str) -> list[tuple[str, bool]]:
        return list(show_batch.token_texts(tokenizer, [tokenizer.token_id(name) for name in names], marks))

    assert texts("<s>", "\u2581", "<|end|>") == [("<s>", True), ("\u2423", False), ("<|end|>", True)]
    assert texts("<0x0A>") == [("\u23ce\n", False)]
    assert texts("<0xC3>", "<0xA9>") == [("\u00e9", False)]
    assert texts("<0xC3>") == [("\\xc3", False)]
    assert show_batch.Marks.of("ascii").newline == "\\n\n"


def test_byte_level_tokens_are_read_as_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(chat_folder(tmp_path / "llama", "llama"), FAMILIES["llama"].chat)
    marks = show_batch.Marks.of("utf-8")
    ids = tokenizer.encode("<|eot_id|> red \u4e16\n\ncat ")
    parts = list(show_batch.token_texts(tokenizer, ids, marks))
    assert "".join(part for part, _ in parts) == "<|eot_id|> red\u2423\u4e16\u23ce\n\u23ce\ncat\u2423"
    assert [part for part, special in parts if special] == ["<|eot_id|>"] and len(parts) < len(ids)


def test_colour_underlines_supervised_tokens_and_nothing_else() -> None:
    tokenizer = Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat)
    position, response = show_batch.Position, Modality.RESPONSE
    sequence = [
        position(tokenizer.token_id("<s>"), Modality.TEXT, 0, False),
        *[position(tokenizer.image_id, Modality.IMAGE, 0, False)] * 4,
        *[position(tokenizer.image_id, Modality.AUDIO, 0, False)] * 3,
        position(tokenizer.token_id("\u2581"), response, 0, True),
        position(tokenizer.eos_id, response, 0, True),
        *[position(tokenizer.pad_id, Modality.PAD, -1, False)] * 3,
    ]
    marks, media = show_batch.Marks.of("utf-8"), {Modality.IMAGE: 2, Modality.AUDIO: 3}
    text = show_batch.render(sequence, tokenizer, media, marks, plain=False)
    assert text.plain == (
        "<s>[image 1: 2 positions][image 2: 2 positions][audio 1: 3 positions]\u2423<|endoftext|>\n"
        "[padding: 3 positions]"
    )
    underlined = [text.plain[span.start : span.end] for span in text.spans if "underline" in str(span.style)]
    assert underlined == ["\u2423", "<|endoftext|>"]
    assert "{+\u2423<|endoftext|>+}" in show_batch.render(sequence, tokenizer, media, marks, plain=True).plain
    assert show_batch.statistics_line(sequence, media) == (
        "13 positions: 10 real (76.9%), 2 supervised, 2 images of 2 positions, 1 recordings of 3 positions, 1 samples"
    )
