"""What pd-launch knows about serving engines and KV connectors. Pure: values in, values out, no I/O.

base.py      words that the other modules share: role, JSON, connector, hand-off
topology.py  the seam between launcher and proxy: which nodes there are, and where
openai.py    client body -> prefill body and decode body, or the reason for the aggregated path
mooncake.py  MooncakeConnector: engine configuration, identity, hand-off
vllm.py      vLLM: command line, environment, counters that prove a transfer
plugins/     modules that the engine process loads (they import the engine, never us)
sim/         a vLLM stand-in with Mooncake semantics (a server; the one part that does I/O)
"""
