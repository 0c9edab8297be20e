"""The page over a tiny random model, on a real server."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from serving_models import LIMITS, NAME, running_server, tiny_model

from aki_megatron.evaluate.chat_page.compared import Comparison, NamedModel, compare_rules
from aki_megatron.evaluate.chat_page.example import Example
from aki_megatron.evaluate.chat_page.page import page_endpoints
from aki_megatron.evaluate.serving.backend import Backend
from aki_megatron.evaluate.serving.service import AnsweringService

PAGE_LIMITS = replace(LIMITS, body_bytes=200_000)


def tiny_comparison(folder: Path) -> Comparison:
    """One model under mma and under causal."""
    return compare_rules(NamedModel(NAME, tiny_model(folder)))


@contextmanager
def running_page(
    comparison: Comparison, examples: tuple[Example, ...] = (), served: list[Backend] | None = None
) -> Iterator[str]:
    """A server with the page; yields its address. ``served`` gets its backends."""
    with ExitStack() as stack:
        backends: dict[str, Backend] = {}
        for each in comparison.models:
            service = AnsweringService(each.model, max_sequences=PAGE_LIMITS.batch, max_waiting=PAGE_LIMITS.queue)
            backends[each.name] = Backend(service, PAGE_LIMITS, model_name=each.name)
            stack.callback(backends[each.name].close)
            service.start()
            stack.callback(service.stop, timeout=300)
        if served is not None:
            served += backends.values()
        first, *others = backends.values()
        endpoints = page_endpoints(backends, comparison, examples)
        yield stack.enter_context(running_server(first, others=others, endpoints=endpoints))
