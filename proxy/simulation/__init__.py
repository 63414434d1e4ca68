"""What nodes that are not there would do: requests through the proxy's own choice of nodes, in virtual time.

    engines.py    engines that take as long as was measured (`engines/performance.py`)
    world.py      requests, nodes, and who gets which
    __main__.py   as a program: JSON in, JSON out

May import `nodes` and `routing`, whose code it runs; nothing here is part of a proxy that serves.
"""
