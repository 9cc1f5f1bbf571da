"""
__init__.py: one file per benchmark. eval.py needs of it `load` (rows with messages),
`with_answer`, `score`, `read_predictions`, `summary` and MAX_NEW_TOKENS. It may have an `answer` of
its own, `judge_messages` for a judge, and `dump` for an official scorer that reads another form.
"""
