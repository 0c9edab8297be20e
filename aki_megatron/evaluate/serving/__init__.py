"""An OpenAI-compatible endpoint for one model: requests in, answers out of one running batch.

limits.py         what a request may cost
errors.py         refusals in OpenAI's shape
parameters.py     the parameters of a request beside its messages
conversations.py  its messages, rendered as in training
service.py        the thread that owns the model
body.py           the body of an HTTP request, JSON or a form, within limits
access.py         who may ask: key, origin, host
replies.py        answers in OpenAI's shape
completions.py    /v1/chat/completions
app.py            all endpoints as one application
web.py, server.py the only ways to starlette and to uvicorn
"""
