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
