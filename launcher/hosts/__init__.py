"""Where children run: what a host is like, its ports and GPUs kept, processes started there and ended.

host.py  what a run wants of a host (`Host`, `Running`); local/ is this machine

May import: plan, setup, errors, private. Everything of a run that touches a machine is in here.
"""
