"""The data plane: one client request in, two node requests out.

cli.py        flags, file and environment -> settings -> server
settings.py   the proxy's settings
errors.py     what can go wrong

downstream/   the client's side: connections, requests read, answers written
serving/      the application: who may ask, who is let in, what is said of it all
exchange/     the life of one request: attempt, legs, hand-off, answer
nodes/        which nodes there are, what is known of each, does KV move
routing/      which node a request gets
simulation/   what nodes that are not there would do, by the same choice of nodes, in virtual time
upstream/     the nodes' side: the HTTP/1.1 client of the hot path
"""
