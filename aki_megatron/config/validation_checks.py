"""Checks of the section ``validation`` against the other sections of a run."""

from collections import Counter
from collections.abc import Iterator

from aki_megatron.config.run import RunConfig


def validation_problems(run: RunConfig) -> Iterator[str]:
    """Check that there is something to validate on, of the kind that is trained, and that answers fit the decoder."""
    validation, kind = run.validation, run.data.kind
    if validation.interval == 0:
        return
    if kind == "captions":
        if not validation.captions:
            yield (
                f"validation.interval={validation.interval} with data.kind=captions needs validation.captions, caption "
                'sets that are not trained on; for example [{name: val, shards: ["val/{00000..00003}.tar"]}]; or set '
                "validation.interval to 0."
            )
        if validation.sources:
            yield "data.kind=captions validates on validation.captions; remove validation.sources."
        if validation.generate:
            yield (
                f"validation.generate={validation.generate} answers questions, and data.kind=captions has none; set it "
                "to 0."
            )
    elif validation.captions:
        yield "data.kind=conversations validates on validation.sources; remove validation.captions."
    for key, names in (("sources", [source.name for source in validation.sources]),
                       ("captions", [captions.name for captions in validation.captions])):  # fmt: skip
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            yield f"validation.{key} names {', '.join(twice)} more than once; keep one entry of each."
    for captions in validation.captions:
        if not captions.shards or any(not pattern.strip() for pattern in captions.shards):
            yield f"validation.captions {captions.name}: shards is empty; name the tars to read."
    yield from _answer_problems(run)


def _answer_problems(run: RunConfig) -> Iterator[str]:
    new, text, latents = run.validation.max_new_tokens, run.data.max_text_tokens, run.model.resampler.num_latents
    positions = run.model.decoder.rope.max_position_embeddings
    if run.validation.generate and text + latents <= positions < text + latents + new:
        yield (
            f"validation.max_new_tokens={new} after a prompt of data.max_text_tokens={text} + "
            f"model.resampler.num_latents={latents} positions exceeds "
            f"model.decoder.rope.max_position_embeddings={positions}; set validation.max_new_tokens to "
            f"{max(1, positions - text - latents)}, or lower data.max_text_tokens."
        )
