"""What nodes that are not there would do: requests through the proxy's own choice of nodes, in virtual time.

    constants.py  how long an engine takes, as measured      engines.py  engines that take so long
    world.py      requests, nodes, and who gets which        __main__.py as a program: JSON in, JSON out

May import `nodes` and `routing`, whose code it runs; nothing here is part of a proxy that serves.
"""
