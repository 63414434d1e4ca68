"""Looking at runs from outside: what is known of each, how it is, what its logs say, and why it failed.

runs.py    a run's folder: whether it is alive, its state, what it left behind
status.py  how it is now
logs.py    its logs as one time line
doctor.py  what failed first, and why

May import: plan, hosts, errors, private.
"""
