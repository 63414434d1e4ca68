"""The control plane: processes, ports, readiness, logs. It never touches a client's request.

cli.py         commands and flags; show.py what they put on the screen, errors.py what can go wrong and the exit codes
config.py      what the user wants

plan.py        what will be started (pure: configuration + facts -> plan); shell.py the same as a script
facts.py       what the plan needs to know of this host
seats.py       which ports and devices each node gets
ports.py       is a port free on the address that will be bound, and who holds it
reserve.py     a plan whose ports are kept from other launchers
preflight.py   everything that can be checked before something starts
setup.py       the engine's own environment; the tiny model

supervisor.py  a run: start all, watch, change, stop in order
life.py        one child through its deaths
process.py     one child process: start, stop; what it may leave behind
tether.py      ties a child's life to the launcher's
readiness.py   when a node can be used
proof.py       one request through both legs: did KV move
progress.py    what the user sees meanwhile
record.py      what a run writes down for others; private.py how
control.py     the socket over which it is asked to change

runs.py        what is known of a run from outside of it
operate.py     what is done to it from there; detached.py starts one that stays
status.py      how it is
logs.py        its logs as one time line
doctor.py      why it failed
selftest.py    `pd-launch test`, stage by stage
"""
