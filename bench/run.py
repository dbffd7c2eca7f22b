"""All benches of the router, one after the other.

    python -m bench.run [--quick] [--full] [--seconds S] [--json FILE]       (= make bench)

About seven minutes, `--quick` about two. For figures that can be compared, let nothing else run.
`python -m bench.peers` puts other gateways and queues beside; `python bench/worker_speed.py` measures
the llama.cpp engine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench import (
    claim,
    idle_workers,
    l402_jobs,
    memory,
    overload,
    paid_jobs,
    server_worker,
    settled_to_assigned,
    streamed_tokens,
)
from bench.figures import Options, Report, run

BENCHES = (
    paid_jobs,
    streamed_tokens,
    server_worker,
    l402_jobs,
    settled_to_assigned,
    claim,
    idle_workers,
    memory,
    overload,
)


async def measure(options: Options) -> Sequence[Report]:
    """The reports of all benches."""
    reports: list[Report] = []
    for bench in BENCHES:
        print(f"{bench.__name__} …", file=sys.stderr, flush=True)
        reports += await bench.measure(options)
    return reports


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
