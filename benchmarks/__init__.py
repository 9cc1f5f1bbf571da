"""
__init__.py: one file per benchmark. eval.py needs nothing else of it than `load` (rows with
messages), `with_answer`, `score`, `read_predictions` and `summary`.
"""
