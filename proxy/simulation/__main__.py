"""`python -m proxy.simulation`: a question as JSON on stdin, what would become of its requests as JSON on stdout.

{"constants": {...}, "piece_tokens": 512, "shapes": [{"prefill": 1, "decode": 1}, {"ordinary": 2}],
 "requests": [[at, tokens, output, [piece, ...]], ...]}

[{"rows": [[due, first, ended], ...], "stages": {name: seconds in the mean}, "busy": {role: share}}, ...]
"""

import sys
from itertools import accumulate
from typing import Any

import orjson

from engines.performance import Constants

from .engines import Job
from .world import Shape, World


def answer(question: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each shape."""
    constants, piece = Constants.model_validate(question["constants"]), question["piece_tokens"]
    chains = [
        tuple(accumulate(pieces, lambda a, b: hash((a, b)), initial=0))[1:] for *_, pieces in question["requests"]
    ]
    found = []
    for shape in question["shapes"]:
        jobs = [
            Job(number, at, tokens, output, chain[: tokens // piece], piece)
            for number, ((at, tokens, output, _), chain) in enumerate(zip(question["requests"], chains, strict=True))
        ]
        world = World(Shape(**shape), constants)
        world.play(jobs)
        wall = max(job.ended for job in jobs) if jobs else 0.0
        names = dict.fromkeys(name for job in jobs for name in job.stages)
        found.append(
            {
                "rows": [[job.due, job.first + constants.rest_s, job.ended + constants.rest_s] for job in jobs],
                "stages": {name: sum(job.stages.get(name, 0.0) for job in jobs) / len(jobs) for name in names},
                "busy": world.busy(wall),
            }
        )
    return found


if __name__ == "__main__":
    sys.stdout.buffer.write(orjson.dumps(answer(orjson.loads(sys.stdin.buffer.read()))))
