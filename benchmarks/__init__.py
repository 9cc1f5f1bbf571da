"""One file per benchmark: `load` rows with messages, `with_answer`, `score`, `read_predictions`,
`summary`; nothing else is needed.
"""
