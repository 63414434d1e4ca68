"""Which nodes there are, what is known of each, and whether KV moves between them.

topology.py  the file that says which nodes there are, followed
fleet.py     all nodes; which of them belong together
node.py      one node: probes and requests report to it; breaker.py: what requests found
prober.py    asks every node at its own pace, and hears when one dies; pauses.py: when this process stood still
transfer.py  does KV really move?
clients.py   the connections to each node

May import: upstream, engines.
"""
