"""Run clients on a real cluster for as long as you like, and judge what they were shown.

python -m tests.history --operations N [--engine mariadb] [--seed SEED] [--consistency eventual]
"""

import argparse
import itertools
import sys
import time
from collections import Counter

from aurora_router.local import CLUSTERS
from tests.history.clients import run
from tests.history.history import check

# Operations until the routers are replaced, because after many losses a router takes its readers back late.
AT_ONCE = 50_000

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=AT_ONCE, help=f"how many ({AT_ONCE:,})")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what the clients and the faults do")
    parser.add_argument("--engine", choices=CLUSTERS, default="postgresql", help="whose servers")
    parser.add_argument("--consistency", default="session", help='"eventual" violates every guarantee')
    asked = parser.parse_args()
    began, counts = time.monotonic(), Counter[str]()
    with CLUSTERS[asked.engine](readers=2, synchronous=True) as cluster:
        for seed, first in enumerate(range(0, asked.operations, AT_ONCE), asked.seed):
            cluster.heal()
            done = run(cluster, min(AT_ONCE, asked.operations - first), seed=seed, consistency=asked.consistency)
            violations = check(done.history)
            counts += done.counts
            print(f"{time.monotonic() - began:4.0f} s, seed {seed}: {done.operations:,} operations", file=sys.stderr, flush=True)
            if violations:
                sys.exit("\n".join([*map(str, itertools.islice(violations, 20)), f"{len(violations)} violations"]))
    print(f"no violation among {', '.join(f'{count:,} {what}' for what, count in counts.most_common())}")
