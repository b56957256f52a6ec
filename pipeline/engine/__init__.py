"""Running a plan: workers that read, measure, solve and write, and the driver that leads them.

Owns execution and the run folder. Ray is known to the modules ``executors/ray*.py`` alone.
"""
