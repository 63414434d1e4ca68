"""The machine that the launcher runs on.

host.py      all of it, as a `Host`
facts.py     what it is like; gpus.py, rdma.py: its devices
ports.py     is a port free on the address that will be bound, and who holds it; kept until its child listens
locks.py     ports and GPUs kept from other launchers
process.py   one child: started in its own group with its own log, stopped whole
members.py   whose processes and shared memory are these
tether.py    ties a child's life to the launcher's
"""
