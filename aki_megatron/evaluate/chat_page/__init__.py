"""A page to try models on: a picture, questions, the answers of two models side by side, what image tokens attend to.

compared.py    which two models the page shows: two runs, or one under two attention rules with the same weights
inspection.py  /inspect: what the last picture of a conversation attends to
example.py     pictures to begin with
wording.py     how questions are put, as in the training of the model
page.py        the page's files, and what it asks for first: models, limits, examples
static/        HTML, CSS and JavaScript as the browser gets them; they load nothing from other servers
"""
