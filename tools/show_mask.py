"""Draw the attention mask of every rule as a PNG: one line per query token, one column per key token.

    python tools/show_mask.py                                  # a built-in sample, all rules -> mask.png
    python tools/show_mask.py --rules causal mma --out two.png
    python tools/show_mask.py --text "<image> Which is red ? <|assistant|> => The cup . || And blue ? => Two books ."
    python tools/show_mask.py --rules mma --visible_fraction 0.5 --selection suffix

How to read the figure: a filled square means that the token on the left attends to the token below. Pale squares are
the causal past that every rule has; saturated squares look ahead, which is what a rule adds. Orange is image, blue
prompt, green response. Under mma the image tokens attend to the prompt after them: saturated blue squares right of the
image, none in green.

How to write --text: words are tokens; <image> stands for one image of --latents tokens; => starts the response, which
is supervised; || starts the next turn.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch

from aki_megatron.attention import AttentionMask
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig
from aki_megatron.errors import UserError
from aki_megatron.evaluate.mask_figure import MaskPanel, draw_masks
from aki_megatron.types import Modality

EXAMPLE = (
    "<s> <|user|> <image> What is left of the cup ? <|assistant|> => A spoon . <end> || "
    "<|user|> Is it big ? <|assistant|> => No . <end>"
)


def parse_text(text: str, latents: int) -> tuple[list[str], list[int]]:
    """Return labels and modality ids of a sample written as described above."""
    labels: list[str] = []
    modality_ids: list[int] = []
    modality = Modality.TEXT
    for word in text.split():
        if word in ("=>", "||"):
            modality = Modality.RESPONSE if word == "=>" else Modality.TEXT
        elif word == "<image>":
            labels += [f"image {n + 1}" for n in range(latents)]
            modality_ids += [Modality.IMAGE] * latents
        else:
            labels.append(word)
            modality_ids.append(modality)
    if not labels:
        raise UserError(
            "--text has no tokens; write at least one word, for example --text '<image> Why ? => Because .'"
        )
    return labels, modality_ids


def panel(attention: AttentionConfig, modality_ids: list[int], latents: int) -> MaskPanel:
    """Return the mask of one rule over one sample; every token that predicts a response is supervised."""
    modality = torch.tensor([modality_ids], dtype=torch.int8)
    supervised = torch.zeros(modality.shape, dtype=torch.bool)
    supervised[:, :-1] = modality[:, 1:] == Modality.RESPONSE
    segment_ids = torch.zeros(modality.shape, dtype=torch.int32)
    mask = AttentionMask.build(modality, segment_ids, attention, supervised=supervised, image_tokens=latents)
    fraction = f", {attention.visible_fraction:.0%} of the prompt" if attention.visible_fraction < 1 else ""
    title = f"{attention.rule}{fraction} ({mask.num_pairs} of {modality.numel() ** 2} pairs)"
    return MaskPanel(title, mask.dense()[0])


def attention_of(rule: str, arguments: argparse.Namespace) -> AttentionConfig:
    """Return the rule with the options given that it takes."""
    given = vars(arguments)
    options = {name: given[name] for name in ATTENTION_RULES[rule].options if name in given}
    return AttentionConfig.model_validate({"rule": rule, **options})


def fraction(text: str) -> float:
    """Return a number in [0, 1]; argparse reports ValueError."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    rules = list(ATTENTION_RULES)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=EXAMPLE, help="the sample; default: %(default)s")
    parser.add_argument("--rules", nargs="+", default=rules, choices=rules, metavar="RULE",
                        help=f"one panel each; of {', '.join(rules)}; default: all")  # fmt: skip
    parser.add_argument("--latents", type=int, default=9,
                        help="tokens of one image; a square number for cca; default: 9")  # fmt: skip
    parser.add_argument("--visible_fraction", type=fraction, default=1.0,
                        help="mma: fraction of the prompt that images see, 0 to 1; default: 1")  # fmt: skip
    selections = get_args(AttentionConfig.model_fields["selection"].annotation)
    parser.add_argument("--selection", choices=selections, default="prefix",
                        help="mma: which part of the prompt; default: prefix")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("mask.png"), help="the figure; default: mask.png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw the figure and print its path."""
    arguments = parse(argv)
    try:
        labels, modality_ids = parse_text(arguments.text, arguments.latents)
        panels = [panel(attention_of(rule, arguments), modality_ids, arguments.latents) for rule in arguments.rules]
        figure = draw_masks(panels, modality_ids, labels, panels_per_line=min(len(panels), 3))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    arguments.out.write_bytes(figure)
    print(f"{arguments.out}: {len(labels)} tokens, rules {', '.join(arguments.rules)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
