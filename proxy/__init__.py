"""The data plane: one client request in, two node requests out.

cli.py         flags -> settings -> server
config.py      the proxy's settings
app.py         routes; the one place where an error becomes an HTTP answer
errors.py      what can go wrong

exchange.py    the life of one request
failover.py    another try on another node: when, and how often all in all
resume.py      a stream that lost its decode node goes on from another
release.py     a hand-off that will not be used is given back
media.py       media in messages, fetched once for both legs
background.py  work that outlives its request

accepting.py   the event loop: how new connections are taken
server.py      one client's connection
transport.py   the HTTP/1.1 client of the hot path
passing.py     what a stream's bytes go through on their way
admission.py   how many are inside, who waits, who is told to come back later
keys.py        who may ask

pool.py        what is known of each node, and which one is next (no I/O)
health.py      probes: is a node there, and which life of it
breaker.py     what requests themselves tell of a node
transfer.py    does KV really move?
topology.py    the file that says which nodes there are, watched
admin.py       nodes added, drained and removed at run time

worker.py      one of several processes that serve one port
board.py       what those tell each other
metrics.py     counters and histograms
logs.py        log lines
shutdown.py    SIGTERM, and what follows
"""
