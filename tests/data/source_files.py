"""Small files in the formats of the fine-tuning sources that ``data_files.write_sources`` does not write."""

import json
from pathlib import Path
from typing import Any

from data_files import image_bytes

ISBNS = ("0761183272", "1400031354", "0486404536")


def put(root: Path, name: str, content: Any) -> Path:
    """Write JSON, or bytes as they are."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def write_gqa(root: Path) -> None:
    question = {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "isBalanced": True,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": "yes",
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": "Yes, the sky is dark.",
    }
    other = {**question, "question": "What is on the wall?", "answer": "pipe", "imageId": "n161313"}
    put(root, "GQA/train_balanced_questions.json", {"02930152": question, "07333408": {**other, "types": {}}})
    put(root, "GQA/val_balanced_questions.json", {"05451384": other})
    for image_id in ("2354786", "n161313"):
        put(root, f"GQA/images/{image_id}.jpg", image_bytes(3))


def write_ocrvqa(root: Path) -> None:
    def cover(split: int, extension: str) -> dict[str, Any]:
        return {
            "imageURL": f"http://ecx.images-amazon.com/images/I/51l6XIoa3rL.{extension}",
            "title": "Mom's Family Wall Calendar 2016",
            "authorName": "Sandra Boynton",
            "genre": "Calendars",
            "split": split,
            "questions": ["Who wrote this book?", "Is this book related to Calendars?"],
            "answers": ["Sandra Boynton", "Yes"],
        }

    covers = dict(zip(ISBNS, (cover(1, "jpg"), cover(2, "gif"), cover(3, "jpg")), strict=True))
    put(root, "OCRVQA/dataset.json", covers)
    put(root, f"OCRVQA/images/{ISBNS[0]}.jpg", image_bytes(4))
    put(root, f"OCRVQA/images/{ISBNS[1]}.gif", image_bytes(5, form="GIF"))


def write_scienceqa(root: Path) -> None:
    with_image = {
        "question": "Which of these states is farthest north?",
        "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
        "answer": 0,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade2",
        "subject": "social science",
        "topic": "geography",
        "category": "Geography",
        "skill": "Read a map: cardinal directions",
        "lecture": "Maps have four cardinal directions.",
        "solution": "To find the answer, look at the compass rose.",
        "split": "train",
    }
    text_only = {
        **with_image,
        "question": "Which word does not rhyme?",
        "choices": ["peg", "keg", "hot"],
        "answer": 2,
        "hint": "Two of the words rhyme.",
        "image": None,
    }
    problems = {
        "1": with_image,
        "2": text_only,
        "3": {**with_image, "split": "val"},
        "4": {**text_only, "split": "test"},
    }
    put(root, "ScienceQA/problems.json", problems)
    put(root, "ScienceQA/images/train/1/image.png", image_bytes(6, form="PNG"))
    put(root, "ScienceQA/images/val/3/image.png", image_bytes(7, form="PNG"))


def write_refer(root: Path, variant: str, split: str = "train") -> None:
    """RefCOCO, RefCOCO+ or RefCOCOg in MDETR's format."""
    entries = [
        {
            "file_name": f"COCO_train2014_{image_id:012d}.jpg",
            "height": 480,
            "width": 640,
            "id": number,
            "original_id": image_id,
            "caption": phrase,
            "dataset_name": variant,
        }
        for number, (image_id, phrase) in enumerate([(1, "the lady in blue"), (2, "man on the right")])
    ]
    annotations = [
        {"area": 1.0, "iscrowd": 0, "image_id": number, "category_id": 1, "id": number, "bbox": box}
        for number, box in enumerate([[103.93, 299.99, 134.22, 177.42], [374.31, 65.06, 136.04, 201.94]])
    ]
    content = {"info": {}, "licenses": [], "images": entries, "annotations": annotations, "categories": []}
    put(root, f"ref/annotations/finetune_{variant}_{split}.json", content)
    for image_id in (1, 2):
        put(root, f"VQA/train2014/COCO_train2014_{image_id:012d}.jpg", image_bytes(image_id))


def write_visualgenome(root: Path) -> None:
    regions = [
        {"region_id": 1382, "image_id": 1, "x": 421, "y": 57, "width": 82, "height": 139,
         "phrase": "the clock is green in colour"},
        {"region_id": 1383, "image_id": 1, "x": -3, "y": 372, "width": 900, "height": 300, "phrase": "a grey road"},
    ]  # fmt: skip
    other = [{**regions[0], "region_id": 4092, "image_id": 2, "phrase": "black backpack"}]
    put(
        root,
        "VisualGenome/region_descriptions.json",
        [{"id": 1, "regions": regions}, {"id": 2, "regions": other}, {"id": 3, "regions": []}],
    )
    sizes = [
        {"image_id": image_id, "width": 800, "height": 600, "url": f"https://images.invalid/{image_id}.jpg",
         "coco_id": None, "flickr_id": None}
        for image_id in (1, 2, 3)
    ]  # fmt: skip
    put(root, "VisualGenome/image_data.json", sizes)
    for image_id in (1, 2):
        put(root, f"VisualGenome/images/{image_id}.jpg", image_bytes(image_id))


def write_llava(root: Path) -> None:
    def dialogue(*texts: str) -> dict[str, Any]:
        speakers = ("human", "gpt")
        turns = [{"from": speakers[number % 2], "value": value} for number, value in enumerate(texts)]
        return {"id": "000000033471", "image": "000000033471.jpg", "conversations": turns}

    talk = dialogue(
        "<image>\nWhat are the colors of the bus in the image?",
        "The bus in the image is white and red.",
        "Is the bus driving down the street or pulled off to the side?",
        "The bus is driving down the street.",
    )
    put(root, "llava/llava_instruct_150k.json", [talk, dialogue("Describe the picture.\n<image>", "A bus.")])
    put(root, "A-OKVQA/train2017/000000033471.jpg", image_bytes(8))


def write_more_sources(root: Path) -> None:
    """Write the sources beyond vqav2, vsr, aokvqa and refcoco, all their splits."""
    write_gqa(root)
    write_ocrvqa(root)
    write_scienceqa(root)
    for variant in ("refcoco+", "refcocog"):
        for split in ("train", "val"):
            write_refer(root, variant, split)
    write_visualgenome(root)
    write_llava(root)
