"""Answers computed from a caption and a question's text, independently of the code that wrote the question."""

import re

ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
GRID = {("-".join(filter(None, (ROWS[y], COLUMNS[x]))) or "center"): (x, y) for y in range(3) for x in range(3)}
STEP = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def objects_of(caption: str) -> dict[tuple[int, int], tuple[str, str]]:
    """Return (x, y) of a cell -> colour, kind."""
    found = {}
    for cell_name, color, kind in re.findall(r"([a-z-]+) \((\w+) (\w+)\)", caption):
        found[GRID[cell_name]] = (color, kind)
    return found


def answer(task: str, question: str, caption: str) -> str:
    """Return the correct answer to an open question."""
    objects = objects_of(caption)
    if task == "count":
        (word,) = re.fullmatch(r"How many (\w+) objects are there\?", question).groups()
        return str(sum(word in item for item in objects.values()))
    if task == "color":
        (kind,) = re.fullmatch(r"What color is the (\w+)\?", question).groups()
        (color,) = [color for color, other in objects.values() if other == kind]
        return color
    if task == "exist":
        color, kind = re.fullmatch(r"Is there a (\w+) (\w+)\?", question).groups()
        return "yes" if (color, kind) in objects.values() else "no"
    if task == "ocr":
        (color,) = re.fullmatch(r"What letter is (\w+)\?", question).groups()
        (letter,) = [kind for other, kind in objects.values() if other == color and len(kind) == 1]
        return letter
    assert task == "hop"
    relation, color, kind = re.fullmatch(
        r"What is directly (left of|right of|above|below) the (\w+) (\w+)\?", question
    ).groups()
    ((x, y),) = [cell for cell, item in objects.items() if item == (color, kind)]
    dx, dy = STEP[relation]
    return " ".join(objects[x + dx, y + dy])


def is_adversarial(question: str, caption: str) -> bool:
    """Whether the colour and the kind that are asked for both appear, on different objects."""
    color, kind = re.fullmatch(r"Is there a (\w+) (\w+)\?", question).groups()
    objects = objects_of(caption).values()
    seen = {item[0] for item in objects} >= {color} and {item[1] for item in objects} >= {kind}
    return seen and (color, kind) not in objects


def is_true(statement: str, caption: str) -> bool:
    """Whether a VSR statement holds."""
    *names, last = re.fullmatch(r"The (\w+ \w+) is (left of|right of|above|below) the (\w+ \w+)\.", statement).groups()
    cells = {" ".join(item): cell for cell, item in objects_of(caption).items()}
    (first_x, first_y), (second_x, second_y) = cells[names[0]], cells[last]
    return {
        "left of": first_x < second_x,
        "right of": first_x > second_x,
        "above": first_y < second_y,
        "below": first_y > second_y,
    }[names[1]]


def object_at(cell_name: str, caption: str) -> str:
    """Return the object in a cell."""
    return " ".join(objects_of(caption)[GRID[cell_name]])


def named(words: str) -> tuple[str, str]:
    """``blue letter a`` or ``blue a`` -> colour, kind."""
    color, kind = words.replace("letter ", "").split()
    return color, kind


def gqa(question: str, caption: str) -> str:
    """Return the answer to one of the GQA questions."""
    objects = objects_of(caption)
    name = r"(\w+ (?:letter )?\w+)"
    if match := re.fullmatch(rf"Is there a {name} in the picture\?", question):
        return "yes" if named(match[1]) in objects.values() else "no"
    if match := re.fullmatch(rf"Are there both a {name} and a {name} in the picture\?", question):
        return "yes" if all(named(part) in objects.values() for part in match.groups()) else "no"
    if match := re.fullmatch(rf"What is (?:to the )?({'|'.join(STEP)}) the {name}\?", question):
        (anchor,) = [cell for cell, item in objects.items() if item == named(match[2])]
        (found,) = [item for cell, item in objects.items() if stands(cell, match[1], anchor)]
        return " ".join(found)
    if match := re.fullmatch(r"Do the ([\w ]+) and the ([\w ]+) have the same color\?", question):
        return "yes" if len({only_color(part, caption) for part in match.groups()}) == 1 else "no"
    if match := re.fullmatch(r"What color is the ([\w ]+)\?", question):
        return only_color(match[1], caption)
    if match := re.fullmatch(r"Is the ([\w ]+) (\w+) or (\w+)\?", question):
        (color,) = {only_color(match[1], caption)} & {match[2], match[3]}
        return color
    match = re.fullmatch(r"Is the ([\w ]+) (\w+)\?", question)
    assert match, question
    return "yes" if only_color(match[1], caption) == match[2] else "no"


def stands(first: tuple[int, int], relation: str, second: tuple[int, int]) -> bool:
    """Whether one cell stands in a relation to another."""
    dx, dy = STEP[relation]
    return (first[0] - second[0]) * dx > 0 if dx else (first[1] - second[1]) * dy > 0


def only_color(kind_phrase: str, caption: str) -> str:
    """Return the colour of the one object of a kind."""
    (color,) = [color for color, kind in objects_of(caption).values() if kind == kind_phrase.removeprefix("letter ")]
    return color


def described_cells(phrase: str, caption: str) -> list[tuple[int, int]]:
    """The cells whose object a phrase of RefCOCO+ fits."""
    objects = objects_of(caption)
    if phrase == "the only letter":
        return [cell for cell, (_, kind) in objects.items() if len(kind) == 1]
    if match := re.fullmatch(r"the only (\w+) object", phrase):
        return [cell for cell, (color, _) in objects.items() if color == match[1]]
    if match := re.fullmatch(r"the only ([\w ]+)", phrase):
        return [cell for cell, (_, kind) in objects.items() if kind == match[1].removeprefix("letter ")]
    if match := re.fullmatch(r"([\w ]+) in (\w+)", phrase):
        return [cell for cell, item in objects.items() if item == named(f"{match[2]} {match[1]}")]
    return [cell for cell, item in objects.items() if item == named(phrase)]


def expression_cell(phrase: str, caption: str) -> tuple[int, int]:
    """Return the cell that a phrase of RefCOCOg describes, after asserting everything the phrase states."""
    relations = "|".join(STEP)
    match = re.fullmatch(rf"the ([\w ]+) at the ([a-z-]+) of the picture, ({relations}) the ([\w ]+)", phrase)
    if match:
        name, cell_name, relation, other = match.groups()
    else:
        match = re.fullmatch(rf"a ([\w ]+) painted (\w+) that stands ({relations}) the ([\w ]+)", phrase)
        assert match, phrase
        name, cell_name, relation, other = f"{match[2]} {match[1]}", None, match[3], match[4]
    objects = {item: cell for cell, item in objects_of(caption).items()}
    cell = objects[named(name)]
    assert cell_name is None or GRID[cell_name] == cell, phrase
    assert stands(cell, relation, objects[named(other)]), phrase
    return cell


def region_cells(phrase: str, caption: str) -> list[set[tuple[int, int]]]:
    """Return the cells that a Visual Genome phrase may describe: one of some, or a pair."""
    objects = {item: cell for cell, item in objects_of(caption).items()}
    if match := re.fullmatch(r"the ([\w ]+) is (\w+)", phrase):
        return [{objects[named(f"{match[2]} {match[1]}")]}]
    if match := re.fullmatch(rf"([\w ]+?) ({'|'.join(STEP)}) ([\w ]+)", phrase):
        first, second = objects[named(match[1])], objects[named(match[3])]
        assert stands(first, match[2], second), phrase
        return [{first, second}]
    return [{objects[named(phrase.removeprefix("a ").removesuffix(" on grey ground"))]}]


FACTS = {
    "three sides": "triangle",
    "four sides of the same length": "square",
    "no corner": "circle",
    "two bars": "cross",
}


def science(problem: dict, caption: str) -> str:
    """Return the correct choice of a ScienceQA problem; without an image the scene is in its hint."""
    question = problem["question"]
    if problem["image"] is None:
        caption = problem["hint"]
    if match := re.fullmatch(r"Which letter comes directly (after|before) the letter (\w)\?", question):
        return chr(ord(match[2]) + (1 if match[1] == "after" else -1))
    if match := re.fullmatch(r"Which shape (?:has|is made of) ([\w ]+)\?", question):
        return FACTS[match[1]]
    if match := re.fullmatch(r"Which object is ([a-z-]+)\?", question):
        return object_at(match[1], caption)
    if match := re.fullmatch(r"What color is the ([\w ]+)\?", question):
        return only_color(match[1], caption)
    if question == "How many objects are there?":
        return str(len(objects_of(caption)))
    return answer("hop", question, caption)


def words_of(caption: str) -> list[str]:
    """Return the adjacent letters of one colour, row by row."""
    objects, found = objects_of(caption), []
    for y in range(3):
        before = None
        for x in range(3):
            color, kind = objects.get((x, y), ("", ""))
            if len(kind) == 1 and color == before:
                found[-1] += kind
            elif len(kind) == 1:
                found.append(kind)
            before = color if len(kind) == 1 else None
    return found


def is_reply_true(question: str, reply: str, caption: str) -> bool:
    """Return whether gpt's reply in a LLaVA conversation is true."""
    objects = objects_of(caption)
    letters = sum(len(kind) == 1 for _, kind in objects.values())
    shapes = len(objects) - letters
    if question.startswith("What do you see"):
        described = re.findall(r"At the ([a-z-]+) there is a (\w+ (?:letter )?\w+)\.", reply)
        count = re.match(r"The picture shows (\d) objects\.", reply)[1]
        return (
            int(count) == len(described) and {GRID[cell_name]: named(name) for cell_name, name in described} == objects
        )
    if question.startswith("Are there more"):
        sign = {1: "more shapes than", 0: "as many shapes as", -1: "fewer shapes than"}[
            (shapes > letters) - (shapes < letters)
        ]
        because = f"because {shapes} of the {len(objects)} objects are shapes and {letters} are letters"
        return reply == f"There are {sign} letters, {because}."
    if question.startswith("How many"):
        return reply == f"There are {len(objects)} objects in the picture."
    if match := re.fullmatch(r"What color is the ([\w ]+)\?", question):
        return reply == f"The {match[1]} is {only_color(match[1], caption)}."
    if match := re.fullmatch(r"Where is the ([\w ]+)\?", question):
        cell_name = re.fullmatch(rf"The {match[1]} is at the ([a-z-]+) of the picture\.", reply)[1]
        return objects[GRID[cell_name]] == named(match[1])
    if match := re.fullmatch(r"Is there a ([\w ]+) in the picture\?", question):
        cells = [cell for cell, item in objects.items() if item == named(match[1])]
        if not cells:
            return reply == f"No, there is no {match[1]} in the picture."
        return GRID[re.fullmatch(rf"Yes, there is a {match[1]} at the ([a-z-]+)\.", reply)[1]] == cells[0]
    statement = "The " + re.sub(r" (left of|right of|above|below) ", r" is \1 ", question[len("Is the ") : -1]) + "."
    relation = re.search(r"is (left of|right of|above|below)", statement)[1]
    return reply == ("Yes, it is" if is_true(statement, caption) else "No, it is not") + f" {relation} it."
