"""What lines of engines' logs mean. A log is scanned (`scan`), and several are read as one story (`diagnosis`).

lines.py      a line taken apart: collectors' and writers' prefixes, times
catalogue.py  known texts; families.py: what explains those that nobody knows
scan.py       the lines of one log that tell of a failure; diagnosis.py: which of them all came first

Imports nothing of the project, and does no I/O.
"""
