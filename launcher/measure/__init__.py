"""Is it worth it here? The same requests at the same times for different nodes on the same devices.

    compare.py   the rounds of all arms, in turn      arms.py       what is compared
    workload.py  which requests, and when             traces.py     ... from files and generators
    load.py      sends them, in a process of its own  loadgen.py    that process
    stages.py    where the time went, by the nodes    results.py    one round in figures
    verdict.py   what the rounds say together         report.py     ... on the screen and in files

May import everything but the command line.
"""
