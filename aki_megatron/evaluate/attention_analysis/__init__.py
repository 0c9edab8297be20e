"""What image tokens attend to in the question.

capture.py recomputes attention probabilities of chosen layers beside the kernels; resampler_attention.py those from
latents to patches; words.py finds the words of a question among the tokens; question.py puts them together for one
question (``inspect_question``).
"""
