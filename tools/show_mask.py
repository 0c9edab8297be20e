"""Draw who sees whom, for every attention rule, as a PNG: rows look, columns are seen.

    python tools/show_mask.py                                  # a built-in sample, all rules -> mask.png
    python tools/show_mask.py --rules causal mma --out two.png
    python tools/show_mask.py --text "<image> Which is red ? <|assistant|> => The cup . || And blue ? => Two books ."
    python tools/show_mask.py --rules mma --visible_fraction 0.5 --selection suffix

How to read the picture: a filled square means that the token on the left sees the token below. Pale squares are the
causal past that every rule has; strong squares look ahead, which is what a rule adds. Orange is image, blue prompt,
green response. Under mma the image rows see the question: strong blue squares right of the image, none in green.

How to write --text: words are tokens; <image> stands for one image of --latents places; => begins the response, that
is, what would be learnt; || begins the next turn.
"""

import argparse
import sys
from pathlib import Path

import torch

from aki_megatron.attention import AttentionMask
from aki_megatron.attention.rules import RULES
from aki_megatron.errors import UserError
from aki_megatron.evaluate.mask_picture import MaskPanel, draw_masks
from aki_megatron.types import Modality

EXAMPLE = (
    "<s> <|user|> <image> What is left of the cup ? <|assistant|> => A spoon . <end> || "
    "<|user|> Is it big ? <|assistant|> => No . <end>"
)


def tokens_of(text: str, latents: int) -> tuple[list[str], list[int]]:
    """Labels and modality ids of a sample written as described above."""
    labels: list[str] = []
    modality_ids: list[int] = []
    kind = Modality.TEXT
    for word in text.split():
        if word in ("=>", "||"):
            kind = Modality.RESPONSE if word == "=>" else Modality.TEXT
        elif word == "<image>":
            labels += [f"image {n + 1}" for n in range(latents)]
            modality_ids += [Modality.IMAGE] * latents
        else:
            labels.append(word)
            modality_ids.append(kind)
    if not labels:
        raise UserError(
            "--text has no tokens; write at least one word, for example --text '<image> Why ? => Because .'"
        )
    return labels, modality_ids


def panel(rule: str, modality_ids: list[int], arguments: argparse.Namespace) -> MaskPanel:
    """The mask of one rule over one sample; scored is every token that predicts a response."""
    modality = torch.tensor([modality_ids], dtype=torch.int8)
    scored = torch.zeros(modality.shape, dtype=torch.bool)
    scored[:, :-1] = modality[:, 1:] == Modality.RESPONSE
    fraction = arguments.visible_fraction if rule == "mma" else 1.0
    layout = AttentionMask.build(
        modality,
        torch.zeros(modality.shape, dtype=torch.int32),
        rule=rule,
        scored=scored,
        visible_fraction=fraction,
        selection=arguments.selection,
        image_tokens=arguments.latents,
    )
    note = f", {fraction:.0%} of the question" if fraction < 1 else ""
    return MaskPanel(f"{rule}{note} ({layout.area} of {modality.numel() ** 2} pairs)", layout.dense()[0])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=EXAMPLE, help="the sample; default: %(default)s")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES), metavar="RULE",
                        help=f"one panel each; of {', '.join(RULES)}; default: all")  # fmt: skip
    parser.add_argument(
        "--latents", type=int, default=9, help="places of one image; a square number for cca; default: 9"
    )
    parser.add_argument("--visible_fraction", type=float, default=1.0,
                        help="mma: share of the question that images see, 0 to 1; default: 1")  # fmt: skip
    parser.add_argument("--selection", choices=["prefix", "suffix", "random"], default="prefix",
                        help="mma: which part of the question; default: prefix")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("mask.png"), help="the picture; default: mask.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw, and say where."""
    arguments = parse(argv)
    try:
        labels, modality_ids = tokens_of(arguments.text, arguments.latents)
        panels = [panel(rule, modality_ids, arguments) for rule in arguments.rules]
        picture = draw_masks(panels, modality_ids, labels, columns=min(len(panels), 3))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.write_bytes(picture)
    print(f"{arguments.out}: {len(labels)} tokens, rules {', '.join(arguments.rules)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
