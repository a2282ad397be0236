"""Replay one seed with its whole trace: `python -m tests.simulation SEED`."""

import sys

from tests.simulation.simulation import Violation, run

if len(sys.argv) != 2 or not sys.argv[1].isdigit():
    sys.exit(__doc__)
try:
    done = run(int(sys.argv[1]), print)
except Violation as violation:
    sys.exit(f"\n{violation}")
print(f"all invariants hold; {done.by_readers} of {done.reads} reads were served by readers")
