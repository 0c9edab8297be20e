"""Synthetic data for the demo and the tests, with a tokenizer and a vision encoder trained on them.

    scenes.py, book_covers.py   a scene (shapes and letters on a 3x3 grid) and its image
    questions.py                captions, questions and answers about a scene
    scene_pools.py              which scenes a dataset is about
    formats/                    one writer per public format, named as its reader in data/sources
    dataset.py                  the whole dataset in one folder
    extra_datasets.py           the datasets beside the captions and the first four
    demo_tokenizer.py           the tokenizer
    encoder.py                  training of the vision encoder
    encoder_folder.py           the encoder as a SigLIP folder

Every byte follows from the sizes and the seed. Strings that seed a generator or end up in a file must not change.
"""
