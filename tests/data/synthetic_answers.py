"""Answers worked out anew from a caption and a question's text, without the code that asked."""

import re

ROWS = ("top", "", "bottom")
COLUMNS = ("left", "", "right")
GRID = {("-".join(filter(None, (ROWS[y], COLUMNS[x]))) or "center"): (x, y) for y in range(3) for x in range(3)}
STEP = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


def objects_of(caption: str) -> dict[tuple[int, int], tuple[str, str]]:
    """(x, y) of a cell -> colour, kind."""
    found = {}
    for place, color, kind in re.findall(r"([a-z-]+) \((\w+) (\w+)\)", caption):
        found[GRID[place]] = (color, kind)
    return found


def answer(task: str, question: str, caption: str) -> str:
    """The right answer to an open question."""
    things = objects_of(caption)
    if task == "count":
        (word,) = re.fullmatch(r"How many (\w+) objects are there\?", question).groups()
        return str(sum(word in thing for thing in things.values()))
    if task == "color":
        (kind,) = re.fullmatch(r"What color is the (\w+)\?", question).groups()
        (color,) = [color for color, other in things.values() if other == kind]
        return color
    if task == "exist":
        color, kind = re.fullmatch(r"Is there a (\w+) (\w+)\?", question).groups()
        return "yes" if (color, kind) in things.values() else "no"
    if task == "ocr":
        (color,) = re.fullmatch(r"What letter is (\w+)\?", question).groups()
        (letter,) = [kind for other, kind in things.values() if other == color and len(kind) == 1]
        return letter
    assert task == "hop"
    relation, color, kind = re.fullmatch(
        r"What is directly (left of|right of|above|below) the (\w+) (\w+)\?", question
    ).groups()
    ((x, y),) = [cell for cell, thing in things.items() if thing == (color, kind)]
    dx, dy = STEP[relation]
    return " ".join(things[x + dx, y + dy])


def is_adversarial(question: str, caption: str) -> bool:
    """Whether the colour and the kind that are asked for both appear, on different objects."""
    color, kind = re.fullmatch(r"Is there a (\w+) (\w+)\?", question).groups()
    things = objects_of(caption).values()
    seen = {thing[0] for thing in things} >= {color} and {thing[1] for thing in things} >= {kind}
    return seen and (color, kind) not in things


def is_true(statement: str, caption: str) -> bool:
    """Whether a VSR statement holds."""
    *names, last = re.fullmatch(r"The (\w+ \w+) is (left of|right of|above|below) the (\w+ \w+)\.", statement).groups()
    cells = {" ".join(thing): cell for cell, thing in objects_of(caption).items()}
    (first_x, first_y), (second_x, second_y) = cells[names[0]], cells[last]
    return {
        "left of": first_x < second_x,
        "right of": first_x > second_x,
        "above": first_y < second_y,
        "below": first_y > second_y,
    }[names[1]]


def object_at(place: str, caption: str) -> str:
    """What stands in a place."""
    return " ".join(objects_of(caption)[GRID[place]])


def named(words: str) -> tuple[str, str]:
    """``blue letter a`` or ``blue a`` -> colour, kind."""
    color, kind = words.replace("letter ", "").split()
    return color, kind


def gqa(question: str, caption: str) -> str:
    """The answer to one of the drawn GQA questions."""
    things = objects_of(caption)
    name = r"(\w+ (?:letter )?\w+)"
    if match := re.fullmatch(rf"Is there a {name} in the picture\?", question):
        return "yes" if named(match[1]) in things.values() else "no"
    if match := re.fullmatch(rf"Are there both a {name} and a {name} in the picture\?", question):
        return "yes" if all(named(part) in things.values() for part in match.groups()) else "no"
    if match := re.fullmatch(rf"What is (?:to the )?({'|'.join(STEP)}) the {name}\?", question):
        (anchor,) = [cell for cell, thing in things.items() if thing == named(match[2])]
        (found,) = [thing for cell, thing in things.items() if stands(cell, match[1], anchor)]
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


def only_color(noun: str, caption: str) -> str:
    """The colour of the one object of a kind."""
    (color,) = [color for color, kind in objects_of(caption).values() if kind == noun.removeprefix("letter ")]
    return color


def described_cells(phrase: str, caption: str) -> list[tuple[int, int]]:
    """The cells whose object a phrase of RefCOCO+ fits."""
    things = objects_of(caption)
    if phrase == "the only letter":
        return [cell for cell, (_, kind) in things.items() if len(kind) == 1]
    if match := re.fullmatch(r"the only (\w+) object", phrase):
        return [cell for cell, (color, _) in things.items() if color == match[1]]
    if match := re.fullmatch(r"the only ([\w ]+)", phrase):
        return [cell for cell, (_, kind) in things.items() if kind == match[1].removeprefix("letter ")]
    if match := re.fullmatch(r"([\w ]+) in (\w+)", phrase):
        return [cell for cell, thing in things.items() if thing == named(f"{match[2]} {match[1]}")]
    return [cell for cell, thing in things.items() if thing == named(phrase)]


def expression_cell(phrase: str, caption: str) -> tuple[int, int]:
    """The cell of which a phrase of RefCOCOg speaks, once everything it says has been found true."""
    relations = "|".join(STEP)
    match = re.fullmatch(rf"the ([\w ]+) at the ([a-z-]+) of the picture, ({relations}) the ([\w ]+)", phrase)
    if match:
        name, place, relation, other = match.groups()
    else:
        match = re.fullmatch(rf"a ([\w ]+) painted (\w+) that stands ({relations}) the ([\w ]+)", phrase)
        assert match, phrase
        name, place, relation, other = f"{match[2]} {match[1]}", None, match[3], match[4]
    things = {thing: cell for cell, thing in objects_of(caption).items()}
    cell = things[named(name)]
    assert place is None or GRID[place] == cell, phrase
    assert stands(cell, relation, things[named(other)]), phrase
    return cell


def region_cells(phrase: str, caption: str) -> list[set[tuple[int, int]]]:
    """The cells that a Visual Genome phrase may mean: one of some, or a pair."""
    things = {thing: cell for cell, thing in objects_of(caption).items()}
    if match := re.fullmatch(r"the ([\w ]+) is (\w+)", phrase):
        return [{things[named(f"{match[2]} {match[1]}")]}]
    if match := re.fullmatch(rf"([\w ]+?) ({'|'.join(STEP)}) ([\w ]+)", phrase):
        first, second = things[named(match[1])], things[named(match[3])]
        assert stands(first, match[2], second), phrase
        return [{first, second}]
    return [{things[named(phrase.removeprefix("a ").removesuffix(" on grey ground"))]}]


FACTS = {
    "three sides": "triangle",
    "four sides of the same length": "square",
    "no corner": "circle",
    "two bars": "cross",
}


def science(problem: dict, caption: str) -> str:
    """The right choice of a ScienceQA problem; what it is about without a picture stands in its hint."""
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
    """Letters of one colour side by side, row by row."""
    things, found = objects_of(caption), []
    for y in range(3):
        before = None
        for x in range(3):
            color, kind = things.get((x, y), ("", ""))
            if len(kind) == 1 and color == before:
                found[-1] += kind
            elif len(kind) == 1:
                found.append(kind)
            before = color if len(kind) == 1 else None
    return found


def says_true(question: str, reply: str, caption: str) -> bool:
    """Whether gpt's reply in a drawn LLaVA dialogue is right."""
    things = objects_of(caption)
    letters = sum(len(kind) == 1 for _, kind in things.values())
    shapes = len(things) - letters
    if question.startswith("What do you see"):
        told = re.findall(r"At the ([a-z-]+) there is a (\w+ (?:letter )?\w+)\.", reply)
        count = re.match(r"The picture shows (\d) objects\.", reply)[1]
        return int(count) == len(told) and {GRID[place]: named(name) for place, name in told} == things
    if question.startswith("Are there more"):
        sign = {1: "more shapes than", 0: "as many shapes as", -1: "fewer shapes than"}[
            (shapes > letters) - (shapes < letters)
        ]
        because = f"because {shapes} of the {len(things)} objects are shapes and {letters} are letters"
        return reply == f"There are {sign} letters, {because}."
    if question.startswith("How many"):
        return reply == f"There are {len(things)} objects in the picture."
    if match := re.fullmatch(r"What color is the ([\w ]+)\?", question):
        return reply == f"The {match[1]} is {only_color(match[1], caption)}."
    if match := re.fullmatch(r"Where is the ([\w ]+)\?", question):
        place = re.fullmatch(rf"The {match[1]} is at the ([a-z-]+) of the picture\.", reply)[1]
        return things[GRID[place]] == named(match[1])
    if match := re.fullmatch(r"Is there a ([\w ]+) in the picture\?", question):
        places = [cell for cell, thing in things.items() if thing == named(match[1])]
        if not places:
            return reply == f"No, there is no {match[1]} in the picture."
        return GRID[re.fullmatch(rf"Yes, there is a {match[1]} at the ([a-z-]+)\.", reply)[1]] == places[0]
    statement = "The " + re.sub(r" (left of|right of|above|below) ", r" is \1 ", question[len("Is the ") : -1]) + "."
    relation = re.search(r"is (left of|right of|above|below)", statement)[1]
    return reply == ("Yes, it is" if is_true(statement, caption) else "No, it is not") + f" {relation} it."
