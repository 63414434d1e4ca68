"""The data plane: one client request in, two node requests out.

cli.py        flags -> settings -> server
config.py     the proxy's settings
app.py        routes; the one place where an error becomes an HTTP answer
exchange.py   the life of one request
pool.py       what is known of each node, and which one is next (no I/O)
transport.py  the HTTP/1.1 client of the hot path
health.py     probes: is a node there, and which life of it
topology.py   the file that says which nodes there are, watched
metrics.py    counters and histograms
errors.py     what can go wrong
"""
