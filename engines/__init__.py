"""What pd-launch knows about serving engines and KV connectors. Pure: values in, values out, no I/O.

base.py      words that the other modules share: role, JSON, connector, hand-off, engine
topology.py  the seam between launcher and proxy: which nodes there are, and where
performance.py  how long an engine takes, as constants
openai/      the routes and their answers: errors, server-sent events, streams collected and continued
vllm/        vLLM: command line, the bodies of the two legs, metrics
connectors/  the KV connectors, one file each
symptoms/    what lines of logs mean: known texts, families of failures, several logs as one story
sim/         a stand-in for an engine (a server, so it does I/O)
plugins/     loaded inside the engine, never imported here
"""
