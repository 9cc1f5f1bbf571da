"""Scoring rules that are too long to stand in a benchmark's file: IFEval, sentence counting,
VoiceBench's answer phrases.
"""
