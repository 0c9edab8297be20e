"""The public benchmarks: readers of their files, scorers, one file each. Without torch.

registry.py lists them; question.py has the types; files.py finds a benchmark's files; tsv.py and parquet.py read them.
"""
