"""Run clients on a real cluster for as long as you like, and judge what they were shown.

python -m tests.history --operations N [--seed SEED]
"""

import argparse
import sys
import time

from aurora_router.local import PostgresCluster
from tests.history.clients import run
from tests.history.history import check

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=50_000, help="how many (50,000)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what the clients and the faults do")
    parser.add_argument("--consistency", default="session", help='"eventual" must violate every guarantee')
    asked = parser.parse_args()
    print(f"seed {asked.seed}", file=sys.stderr)
    with PostgresCluster(readers=2, synchronous=True) as cluster:
        began = time.monotonic()
        done = run(cluster, asked.operations, seed=asked.seed, consistency=asked.consistency)
    print(f"{done.operations:,} operations in {time.monotonic() - began:.0f} s: {dict(done.counts)}")
    began = time.monotonic()
    violations = check(done.history)
    print(f"judged in {time.monotonic() - began:.1f} s")
    for violation in violations[:20]:
        print(violation)
    sys.exit(f"{len(violations)} violations" if violations else None)
