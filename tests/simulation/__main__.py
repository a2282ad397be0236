"""Replay one seed with its whole trace, or run many seeds, for hours if you like, until one violates an invariant.

python -m tests.simulation SEED
python -m tests.simulation --seeds COUNT [--first SEED]
"""

import argparse
import multiprocessing
import sys
import time

from tests.simulation.simulation import Violation, run

CHUNK = 50


def chunk(first: int) -> str | None:
    """The first violation of a chunk of seeds, or None."""
    for seed in range(first, first + CHUNK):
        try:
            run(seed)
        except Violation as violation:
            return str(violation)
    return None


def many(first: int, count: int) -> None:
    """Run seeds on all cores, with a line of progress now and then."""
    began = told = time.monotonic()
    with multiprocessing.Pool() as pool:
        for number, violation in enumerate(pool.imap(chunk, range(first, first + count, CHUNK)), 1):
            if violation is not None:
                sys.exit(f"\n{violation}")
            if time.monotonic() - told > 10:
                told = time.monotonic()
                print(f"{number * CHUNK:,} of {count:,} seeds hold, {told - began:.0f} s", file=sys.stderr, flush=True)
    print(f"all invariants hold in {count:,} seeds from {first:,} on")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int, nargs="?", help="replay this one")
    parser.add_argument("--seeds", type=int, help="how many to run")
    parser.add_argument("--first", type=int, default=0, help="where to begin")
    asked = parser.parse_args()
    if (asked.seed is None) == (asked.seeds is None):
        parser.error("give a seed, or --seeds COUNT")
    if asked.seeds is not None:
        many(asked.first, asked.seeds)
    else:
        try:
            done = run(asked.seed, print)
        except Violation as violation:
            sys.exit(f"\n{violation}")
        print(f"all invariants hold; {done.sessions.by_readers} of {done.sessions.reads} reads were served by readers")
