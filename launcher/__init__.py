"""The control plane: processes, ports, readiness, logs. It never touches a client's request.

cli.py         commands and flags
config.py      what the user wants
plan.py        what will be started (pure: configuration + facts -> plan)
facts.py       what the plan needs to know of this host
ports.py       is a port free on the address that will be bound, and who holds it
preflight.py   everything that can be checked before something starts
setup.py       the engine's own environment; the tiny model
process.py     one child process: start, tail, stop; what it may leave behind
tether.py      ties a child's life to the launcher's
readiness.py   when a node can be used
supervisor.py  a run: start all, watch, stop in order
proof.py       one request through both legs: did KV move
progress.py    what the user sees meanwhile
errors.py      what can go wrong, and the exit code of each
"""
