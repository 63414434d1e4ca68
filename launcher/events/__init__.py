"""What happens, told once: one stream of events with times, and the sinks that show or keep them.

events.py  an event, and the stream; steps that are running
screen.py  a person's screen: a terminal or a pipe
apart.py   ... in a thread of its own, so that one that stalls stops nothing
files.py   launcher.log, and lines of JSON
tail.py    the last lines of a log that something else writes

May import: errors.
"""
