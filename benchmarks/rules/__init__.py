"""
__init__.py: scoring rules that are too long for a benchmark's file. IFEval's instructions, sentence
counting, and the phrases by which VoiceBench reads an answer.
"""
