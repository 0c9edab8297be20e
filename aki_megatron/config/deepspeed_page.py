"""The section of docs/combinations.md on DeepSpeed's settings, from the tables of config/deepspeed_keys.py."""

from aki_megatron.config.deepspeed_keys import ONLY, OWNED, PROVEN, REFUSED
from aki_megatron.config.markdown import code, link, table

DEEPSPEED = """
## DeepSpeed settings

What a file for `--ds_config` may hold (`aki_megatron/config/deepspeed_keys.py`). Every name may be `"auto"`, and every
name that is not in these tables is refused. Settings that the run decides may also have the run's value:

"""

DEEPSPEED_PROVEN = """
These reach DeepSpeed in the ZeRO stages named, and have no effect in others. Proven means that losses, gradient norms
and weights equal those with DeepSpeed's default, also after saving and resuming on another layout, and in the export:

"""

DEEPSPEED_ONLY = """
These are accepted with one value:

"""

DEEPSPEED_REFUSED = """
These are refused with every value:

"""


def deepspeed_section() -> str:
    """Return the section of docs/combinations.md."""
    owned = [["setting", "decided by"]] + [[f"`{name}`", f"`{key}`"] for name, (key, _) in OWNED.items()]
    owned += [
        ["`bf16.enabled`", "`train.precision`"],
        ["`optimizer.params.betas`", "`optimizer.beta1` and `optimizer.beta2`"],
        ["`gradient_accumulation_steps`", "batch sizes and the number of data-parallel ranks"],
    ]
    proven = [["setting", "values", "ZeRO", "effect", "tested with", "proven by"]] + [
        [
            f"`{name}`",
            setting.values.text,
            ", ".join(map(str, setting.zero_stages)),
            setting.effect,
            ", ".join(map(code, setting.tested)),
            link(setting.proof),
        ]
        for name, setting in PROVEN.items()
    ]
    only = [["setting", "value", "reason"]] + [[f"`{name}`", code(one), why] for name, (one, why) in ONLY.items()]
    refused = [["setting or block", "reason"]] + [[f"`{name}`", why] for name, why in REFUSED.items()]
    return "".join(
        head + table(rows)
        for head, rows in (
            (DEEPSPEED, owned),
            (DEEPSPEED_PROVEN, proven),
            (DEEPSPEED_ONLY, only),
            (DEEPSPEED_REFUSED, refused),
        )
    )
