"""Visual Spatial Reasoning (https://github.com/cambridgeltl/visual-spatial-reasoning): true and false statements."""

import json
from collections.abc import Sequence
from pathlib import Path

from aki_megatron.synthetic.files import IMAGE_HOST
from aki_megatron.synthetic.questions import Statement


def write(path: Path, subset: str, stated: Sequence[tuple[int, Sequence[Statement]]]) -> None:
    """Write one JSON object per line from (image id, statements).

    ``subset`` (train2017, val2017) is the image's folder, the last part but one of image_link.
    """
    lines = []
    for image_id, statements in stated:
        image = f"{image_id:012}.jpg"
        for statement in statements:
            line = {
                "image": image,
                "image_link": f"{IMAGE_HOST}/{subset}/{image}",
                "caption": statement.text,
                "label": int(statement.true),
                "relation": statement.relation,
                "annotator_id": 1,
                "vote_true_validator_id": [2, 3] if statement.true else [],
                "vote_false_validator_id": [] if statement.true else [2, 3],
            }
            lines.append(json.dumps(line))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
