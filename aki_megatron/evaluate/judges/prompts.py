"""What a judge is asked.

The default wording is this project's own: scores by it are not comparable to those by the kits' prompts, digit by
digit, and the report says so. A file of prompts replaces it. The name of the prompts is printed beside every judged
score. Each prompt asks for the reply that the kits' parsers read.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template

from aki_megatron.errors import ConfigError

PLACEHOLDERS = {
    "mmvet": ("question", "answer", "reply"),
    "llavabench": ("caption", "question", "answer", "reply"),
    "llavabench_system": (),
    "mathvista": ("question", "reply"),
}
"""Prompt -> what stands in it as ``$question`` and so on."""


@dataclass(frozen=True)
class JudgePrompts:
    """Prompts for a judge, with ``$name`` where a part of the question stands.

    mmvet       asks for a grade from 0.0 to 1.0 and nothing else
    llavabench  asks for two grades from 1 to 10 in the first line, the reference answer's first
    mathvista   asks for the final answer that a reply states
    """

    name: str
    mmvet: str
    llavabench: str
    llavabench_system: str
    mathvista: str

    def fill(self, prompt: str, **parts: str) -> str:
        """Return the prompt of this name with its parts filled in."""
        return Template(getattr(self, prompt)).safe_substitute(parts)


def load_prompts(path: Path) -> JudgePrompts:
    """Read prompts from a JSON object with the fields of JudgePrompts. Raises ConfigError for another form."""
    names = [field.name for field in fields(JudgePrompts)]
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--judge_prompts {path} is no JSON file ({error}).") from error
    if (
        not isinstance(values, dict)
        or set(values) != set(names)
        or not all(isinstance(v, str) for v in values.values())
    ):
        raise ConfigError(f"--judge_prompts {path} must be a JSON object of texts with the keys {', '.join(names)}.")
    for prompt, parts in PLACEHOLDERS.items():
        if missing := [part for part in parts if f"${part}" not in values[prompt]]:
            raise ConfigError(f"--judge_prompts {path}: {prompt} lacks {', '.join(f'${part}' for part in missing)}.")
    return JudgePrompts(**values)


MMVET = """Grade how correct an answer is, from 0.0 (entirely wrong) to 1.0 (entirely right), in steps of 0.1.
In the reference, parts joined by <AND> must all be in the answer for 1.0; of parts joined by <OR> one is enough.

Question: What are the roots? Reference: 2 <AND> 7. Answer: x = 3. Grade: 0.0
Question: What are the roots? Reference: 2 <AND> 7. Answer: x = 7. Grade: 0.5
Question: What are the roots? Reference: 2 <AND> 7. Answer: x is 2 or 7. Grade: 1.0
Question: Which animal is it? Reference: tabby <OR> cat. Answer: It is a cat. Grade: 1.0

Write the grade of the following answer as one number and nothing else.
Question: $question
Reference: $answer
Answer: $reply
Grade:"""

LLAVABENCH = """[Image, described in sentences]
$caption

[Question about the image]
$question

[Answer 1]
$answer

[Answer 2]
$reply

[Task]
Grade both answers from 1 to 10 for helpfulness, relevance, accuracy and detail; a better answer has a higher grade, \
whichever comes first. Write the two grades in the first line, answer 1 first, separated by one blank and with nothing \
else. Explain them in the lines after it."""

MATHVISTA = """Copy the final answer out of a response to a question, in the form that the question's hint asks for: a \
whole number, a number with decimals, a list in brackets, or the letter of an option. Write nothing else.

Question: Hint: answer with a whole number. How many lamps are there?
Response: I count 12 lamps along the street.
Final answer: 12

Question: Hint: answer with a number with one decimal. What is the slope?
Response: The line rises by 3 over 6 units, so the slope is 0.5.
Final answer: 0.5

Question: Hint: answer with a list. Between which years did it grow most?
Response: It grew most from 1998 to 1999.
Final answer: [1998, 1999]

Question: Hint: answer with the option's letter. Which is longer? Choices: (A) red (B) blue
Response: The blue one is longer.
Final answer: B

Question: $question
Response: $reply
Final answer:"""

DEFAULT_PROMPTS = JudgePrompts(
    name="prompts aki-1",
    mmvet=MMVET,
    llavabench=LLAVABENCH,
    llavabench_system="You compare the quality of two answers to a question, carefully and without favour.",
    mathvista=MATHVISTA,
)
