"""From what the user wants, and what a host is like, to everything that will be started. Pure, but for reading a file.

config.py    what the user wants; facts.py: what the host is like
planner.py   the plan made of both: seats.py gives out ports, devices.py GPUs
plan.py      everything that will be started, as values; lockfile.py: by which a run is repeated
render/      the plan in other forms; secrets.py: what is left out of them

May import: errors, private.
"""
