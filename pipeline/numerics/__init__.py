"""Pure numerics: exact sums, the geometric median, linear systems, and the kernels that measure and combine chunks.

Nothing here opens a file, starts a worker or knows what a model is; arrays go in, arrays come out.
"""
