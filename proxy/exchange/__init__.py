"""The life of one request, in the order in which it is lived:

stored.py    responses that a node keeps
receive.py   the body, read, parsed and its media fetched
fanout.py    a request for several sequences is an exchange for each, answered as one
exchange.py  attempts until one answers, or none may follow
attempt.py   choose -> prefill -> decode: one hand-off
leg.py       one request to one node, sent once
handoff.py   the KV that a prefill node holds for us, settled exactly once; release.py gives it back
deliver.py   the answer on its way to the client; filters.py what its bytes go through
resume.py    a stream that lost its node goes on from another
presence.py  is anybody still waiting? retry.py: may it be tried again? record.py: what is told of it in the end

May import: nodes, routing, upstream, engines. Not: downstream, serving.
"""
