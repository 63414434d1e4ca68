"""Which nodes there are, what is known of each, and whether KV moves between them.

topology.py  the file that says which nodes there are, followed
fleet.py     all nodes; which of them belong together
node.py      one node: probes and requests report to it; breaker.py: what requests found
prober.py    asks every node in turn; identity.py: which life of a prefill node this is
transfer.py  does KV really move?
clients.py   the connections to each node

May import: upstream, engines.
"""
