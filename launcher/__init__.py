"""The control plane: facts, plan, checks, hosts, runs, logs. It never touches a client's request.

plan/      what will be started, made from the configuration and the facts of a host
check/     what can be known to go wrong before that
hosts/     what a run wants of a host; this machine
run/       start → prove → watch → stop
events/    what happens, told once, shown and kept
inspect/   runs, their state, their logs, and why they failed
setup/     the engine's own environment
measure/   is it worth it, and how many of each: the same requests for different nodes
cli/       commands, and what they print

errors.py: what can go wrong, with exit codes. private.py: files for this user only.
"""
