"""The client's side: how connections are accepted, requests read and answers written.

listener.py   the event loop: how new connections are taken
protocol.py   one client's connection: one request after the other
head.py       a request's head; framing.py: where its body ends
request.py    one request: its body comes in, its answer goes out
service.py    what the connections of one listener serve, and share
asgi.py       what is no hot path, handed to an ASGI application

May import: upstream (an answer is relayed from there), errors. A handler is given by `serving`.
"""
