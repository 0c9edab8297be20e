"""What each profile asks, and how it becomes a conversation."""

from dataclasses import replace

import pytest
from chat_folders import PHI3_LIKE
from public_files import png

from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmark_conversation import to_conversation
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, InlineImage
from aki_megatron.evaluate.prompts import PROFILES, ImagePart
from aki_megatron.families.registry import FAMILIES
from aki_megatron.types import Modality, Placeholder

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
CHOICES = {"A": "cat", "B": "dog"}
OPTIONS = "Options:\nA. cat\nB. dog\n"
SELECT = "Please select the correct answer from the options above. \n"


def ask(benchmark: str, text: str, **fields: object) -> BenchmarkQuestion:
    return BenchmarkQuestion(benchmark, "1", text, "A", images=(InlineImage(png()),), **fields)  # type: ignore[arg-type]


def test_table6_is_the_default() -> None:
    assert next(iter(PROFILES)) == "table6"
    assert [profile.max_new_tokens for profile in PROFILES.values()] == [256, 512]


@pytest.mark.parametrize(
    ("question", "table6", "vlmevalkit"),
    [
        (ask("MME", "Is it red? Please answer yes or no."), f"{SHORT} Is it red? Please answer yes or no.",
         "Is it red? Please answer yes or no."),
        (ask("POPE", "Is there a cat?"), f"{SHORT} Is there a cat? Please answer yes or no.", "Is there a cat?"),
        (ask("MMBench", "Which?", choices=CHOICES, hint="up"), f"{LETTER} Hint: up\nQuestion: Which?\n{OPTIONS}",
         f"Hint: up\nQuestion: Which?\n{OPTIONS}{SELECT}"),
        (ask("MMBench", "Which?", choices=CHOICES), f"{LETTER} Question: Which?\n{OPTIONS}",
         f"Question: Which?\n{OPTIONS}{SELECT}"),
        (ask("SEED-Bench", "Which?", choices=CHOICES), f"{LETTER} Which?\n{OPTIONS}",
         f"Question: Which?\n{OPTIONS}{SELECT}"),
        (ask("RealWorldQA", "Which?", choices=CHOICES), f"{LETTER} Which?\n{OPTIONS}",
         f"Question: Which?\n{OPTIONS}{SELECT}"),
        (ask("MMMU", "How many?"), f"{SHORT} How many?", "Question: How many?\n"),
        (ask("CV-Bench", "Which?", choices=CHOICES, details={"prompt": "Which? (A) cat (B) dog"}),
         f"{LETTER} Which?\n{OPTIONS}", "Which? (A) cat (B) dog"),
        (ask("MathVista", "Hint: h\nQuestion: q"), "Hint: h\nQuestion: q", "Hint: h\nQuestion: q"),
        (ask("LLaVA-Bench", "Describe it."), "Describe it.", "Describe it."),
        (ask("MM-Vet", "What is x?"), "What is x?", "What is x?"),
    ],
)  # fmt: skip
def test_the_text_of_each_benchmark(question: BenchmarkQuestion, table6: str, vlmevalkit: str) -> None:
    assert PROFILES["table6"].parts(question) == (ImagePart(0), table6)
    assert PROFILES["vlmevalkit"].parts(question) == (ImagePart(0), vlmevalkit)


def test_the_kit_shows_the_first_image_of_mmmu_where_it_stands_and_drops_the_others() -> None:
    question = ask("MMMU", "See <image 2>, then <image 1>? <image x> <image 0>", choices=CHOICES)
    parts = PROFILES["vlmevalkit"].parts(question)
    assert parts[:2] == ("Question: See ", ImagePart(1))
    assert "".join(part for part in parts if isinstance(part, str)).startswith(
        "Question: See , then ? <image x> <image 0>\nOptions:"
    )
    assert sum(isinstance(part, ImagePart) for part in parts) == 1
    assert PROFILES["table6"].parts(question) == (ImagePart(0), f"{LETTER} {question.text}\n{OPTIONS}")


def test_a_conversation_of_table6_leaves_the_place_of_the_image_to_the_template() -> None:
    conversation = to_conversation(ask("POPE", "Is there a cat?"), PROFILES["table6"])
    assert conversation.key == "POPE/1" and conversation.images == [png()]
    assert conversation.turns[0].placeholders == () and conversation.turns[0].response == ""


def test_a_conversation_of_the_kit_places_the_image() -> None:
    question = replace(ask("MMMU", "See <image 2>?"), images=(InlineImage(png()), InlineImage(png("blue"))))
    conversation = to_conversation(question, PROFILES["vlmevalkit"])
    assert conversation.turns[0].placeholders == (Placeholder(len("Question: See "), Modality.IMAGE),)
    assert conversation.turns[0].prompt == "Question: See ?\n" and conversation.images == [png("blue")]


@pytest.mark.parametrize(("profile", "line_break"), [("table6", "\n"), ("vlmevalkit", "")])
def test_the_template_renders_the_layout_of_each_profile(profile: str, line_break: str) -> None:
    template = Template(Tokenizer(PHI3_LIKE, FAMILIES["phi3"].chat), {Modality.IMAGE: 3}, 512, "S")
    parts = template.conversation_parts(to_conversation(ask("MM-Vet", "What is x?"), PROFILES[profile]))
    prompt = "".join(part.text for part in parts[:-1])
    assert prompt.endswith(f"<|user|>\n<image>{line_break}What is x?<|end|>\n<|assistant|>\n")


def test_an_image_that_the_file_does_not_have_is_named() -> None:
    with pytest.raises(DataError, match="POPE question 1 shows image 1, but its file has 0"):
        to_conversation(replace(ask("POPE", "q"), images=()), PROFILES["table6"])
    with pytest.raises(DataError, match="MMMU question 1 shows image 3, but its file has 1"):
        to_conversation(ask("MMMU", "<image 3>"), PROFILES["vlmevalkit"])
