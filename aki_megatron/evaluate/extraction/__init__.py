"""Rules that read an answer out of a model's reply: yes/no, option letters, the official MMMU parser."""
