"""What people and programs see of a merge: the report, the model card, progress on a terminal or in a log.

Owns words and layout; computes nothing that the engine has not measured.
"""
