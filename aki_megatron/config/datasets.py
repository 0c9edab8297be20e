"""The registry of fine-tuning datasets, and the names of formats: what data.sources and data.captions may name.

Readers are in data/sources/. Only their import paths are listed here, so that a configuration is checked without torch.
"""

DATASETS: dict[str, str] = {
    "vqav2": "vqav2:READER",
    "gqa": "gqa:READER",
    "vsr": "vsr:READER",
    "ocrvqa": "ocrvqa:READER",
    "aokvqa": "aokvqa:READER",
    "scienceqa": "scienceqa:READER",
    "refcoco": "refcoco:REFCOCO",
    "refcoco+": "refcoco:REFCOCO_PLUS",
    "refcocog": "refcoco:REFCOCOG",
    "visualgenome": "visualgenome:READER",
    "llava150k": "llava150k:READER",
}
"""Dataset -> module below data/sources/ and the DatasetReader in it. A new dataset is one more line."""

DRAWN_DATASETS: dict[str, str] = {"tones": "tones:READER"}
"""The same for datasets that were never released: tools/make_data.py draws them."""

DATASET_FORMAT = "dataset"
"""data.sources[].format of the datasets above."""

OWN_FORMATS = ("llava", "messages", "parquet")
"""data.sources[].format of files of one's own; data/sources/own.py reads them."""

CAPTION_FORMATS = ("caption", "blip3_ocr")
"""What the txt member of a caption shard holds; data/captions.py parses them."""

OCR_GRANULARITIES = {
    "basic text": 0,
    "positions": 1,
    "fractions": 2,
    "coarse coordinates": 3,
    "fine coordinates": 4,
    "boxes": 5,
}
"""BLIP3-OCR-200M's granularities by name.

    basic text          The image contains the text "X", the text "Y" (the papers' level 1)
    positions           ... located at the top right corner
    fractions           ... located at fractions of width and height
    coarse coordinates  ... at coordinates of few digits
    fine coordinates    ... at coordinates of more digits
    boxes               <ocr>X</ocr><bbox>[x1, y1][x2, y2]</bbox>
"""

OFFICIAL_INDEX = "official index"
"""The released code's choice: the second description, whatever its granularity (1 in the public files)."""
