"""All benchmarks by name. A new one is a file like mme.py and a line here."""

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.benchmark import Benchmark
from aki_megatron.evaluate.benchmarks.cvbench import CVBENCH
from aki_megatron.evaluate.benchmarks.llavabench import LLAVABENCH
from aki_megatron.evaluate.benchmarks.mathvista import MATHVISTA
from aki_megatron.evaluate.benchmarks.mmbench import MMBENCH
from aki_megatron.evaluate.benchmarks.mme import MME
from aki_megatron.evaluate.benchmarks.mmmu import MMMU
from aki_megatron.evaluate.benchmarks.mmvet import MMVET
from aki_megatron.evaluate.benchmarks.pope import POPE
from aki_megatron.evaluate.benchmarks.realworldqa import REALWORLDQA
from aki_megatron.evaluate.benchmarks.seed import SEED

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (MME, MMBENCH, SEED, LLAVABENCH, MMMU, MATHVISTA, POPE, MMVET, REALWORLDQA, CVBENCH)
}
"""In the order of the papers' columns."""


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name, whatever the case. Raises DataError for an unknown one."""
    for known, benchmark in BENCHMARKS.items():
        if known.lower() == name.lower():
            return benchmark
    raise DataError(f"There is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}.")
