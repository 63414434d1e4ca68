"""A run, in the order in which it happens.

supervisor.py  start → prove → watch → stop
fleet.py       all children of the run: started, moved to other ports, ended; life.py: one through its deaths
readiness.py   when a child can be used; proof.py: does KV move
keeper.py      starts again what ends; restarts.py: when, and when no more; liveness.py: is it hung
changes.py     restart and scale, asked over the control socket (control.py)
download.py    the model, before anything starts
record.py      what is written down for others; explain.py: what the logs say of a failure
signals.py     Ctrl-C once, and twice
selftest.py    `pd-launch test`, stage by stage

May import: plan, check, hosts, setup, events, inspect, errors, private.
"""
