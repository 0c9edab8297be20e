"""What image tokens attend to in the question.

capture.py recomputes attention probabilities of chosen layers beside the kernels; resampler_attention.py those from
latents to patches. words.py finds the words of a question among the tokens, taggers.py and categories.py say what they
are; measure.py and statistics.py put that together for many questions, report.py writes it. question.py looks at one
question (``inspect_question``), entities.py and word_map.py at the entities of one picture.
"""
