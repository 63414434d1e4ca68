"""A vLLM stand-in with Mooncake semantics: no model, no GPU, ready at once.

It takes vLLM's command line and environment, answers on vLLM's routes with vLLM's shapes, and treats a hand-off as
vLLM 0.32's MooncakeConnector does, traps included (design notes: CONTRACT.md §0, FAULTS.md). It speeds up testing and
lets one try pd-launch on a laptop; it proves nothing about a real engine.

    tokens.py    tokenizer, chat template and the deterministic "model" (pure)
    request.py   a request's body: what vLLM would refuse, and what it asks for (pure)
    dialects.py  the responses and messages routes, spoken as chat
    kv.py        KV blocks: running, held for a hand-off, pulled, expired, leaked
    transfer.py  the decode side of a hand-off: find the prefill node, pull
    prefixes.py  a node's prefix cache
    timing.py    how long an engine takes (`--speeds`)
    answers.py   chunks and bodies in vLLM's shape (pure)
    faults.py    latency and failures, set through the control route
    server.py    the routes
    __main__.py  command line
"""
