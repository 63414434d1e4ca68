"""Everything that can be known to go wrong before something starts: pure functions of configuration, plan and facts.

checks.py   all of them, in order; findings.py: what they say
one file a theme: model, engine, environment, gpus, transfer, fit, machine, network, proxy, ports, repeat

May import: plan, errors.
"""
