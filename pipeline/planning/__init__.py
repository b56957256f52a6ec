"""From a recipe and headers to a frozen plan: what is read, solved and written, in which pieces, at which cost.

Knows headers and configurations, never a parameter's value.
"""
