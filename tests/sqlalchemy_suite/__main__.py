"""Compare the outcomes of SQLAlchemy's own ORM tests with RoutingSession on a local cluster, and with Session on its writer.

Exits with 1 if they differ and differences.json gives no reason.

python -m tests.sqlalchemy_suite [--quick] [test/orm/test_x.py ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import sqlalchemy

from aurora_router.local import PostgresCluster
from tests.sqlalchemy_suite.plugin import OUTCOMES, READERS

REASONS = Path(__file__).with_name("differences.json")
ROOT = Path(__file__).parents[2]
Outcomes = Mapping[str, str]
QUICK = ("test_bind.py", "test_scoping.py", "test_session.py", "test_transaction.py")

# The tests' tables are written past the router. So a commit is acknowledged when the reader shows it, and no test reads late.
SETTINGS = {"synchronous_commit": "remote_apply"}


def source(directory: Path) -> Path:
    """Download the source distribution of the installed SQLAlchemy, which has its tests."""
    what = f"SQLAlchemy=={sqlalchemy.__version__}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "SQLAlchemy",
        "--dest",
        str(directory),
        what,
    ]
    subprocess.run(pip, check=True)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(directory, filter="data")
    return archive.with_name(archive.name.removesuffix(".tar.gz"))


def outcomes(source: Path, cluster: PostgresCluster, tests: list[str], *, routed: bool) -> Outcomes:
    """Run the tests, and return the outcome of each."""
    found = source / "outcomes.json"
    found.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), OUTCOMES: str(found)}
    if routed:
        environment[READERS] = " ".join(reader.address for reader in cluster.readers)
    options = [
        "--dburi",
        cluster.url,
        "--maxfail=1000",
        "--timeout=300",
        "-q",
        "--tb=short",
        "-p",
        "tests.sqlalchemy_suite.plugin",
    ]
    # With -s, SQLAlchemy's tests run on the installed SQLAlchemy, not on the source beside them.
    with (source / f"{'routed' if routed else 'plain'}.log").open("w") as log:
        command = [sys.executable, "-s", "-m", "pytest", *options, *tests]
        subprocess.run(command, cwd=source, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not found.exists():
        sys.exit(f"the tests did not run:\n{Path(log.name).read_text()[-4000:]}")
    result: Outcomes = json.loads(found.read_text())
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only some of the quickest files")
    parser.add_argument("--keep", type=Path, help="a directory for the source and the logs, which stay there")
    parser.add_argument("tests", nargs="*", help="paths of SQLAlchemy's, instead of test/orm")
    asked = parser.parse_args()
    tests = asked.tests or ([f"test/orm/{name}" for name in QUICK] if asked.quick else ["test/orm"])
    reasons: dict[str, str] = json.loads(REASONS.read_text())

    with tempfile.TemporaryDirectory() as temporary, PostgresCluster(readers=1, synchronous=True, settings=SETTINGS) as cluster:
        directory = asked.keep or Path(temporary)
        directory.mkdir(exist_ok=True)
        for schema in ("test_schema", "test_schema_2"):
            cluster.execute(f"CREATE SCHEMA {schema} AUTHORIZATION app")
        tree = source(directory)
        plain = outcomes(tree, cluster, tests, routed=False)
        routed = outcomes(tree, cluster, tests, routed=True)

    if not plain:
        sys.exit(f"none of SQLAlchemy's tests was run; check the paths: {' '.join(tests)}")
    lines, unexplained = compare(plain, routed, reasons)
    print(*lines, sep="\n")
    print(f"SQLAlchemy {sqlalchemy.__version__}")
    return 1 if unexplained else 0


def compare(plain: Outcomes, routed: Outcomes, reasons: Mapping[str, str]) -> tuple[list[str], frozenset[str]]:
    """Say which outcomes differ, and why. Also return the tests that differ without a known reason."""
    different = {name for name in {**plain, **routed} if plain.get(name) != routed.get(name)}
    lines = []
    for name in sorted(different):
        lines.append(f"{name}: {plain.get(name)} with Session, {routed.get(name)} with RoutingSession")
        lines.append(f"    {reasons.get(name, 'NOT EXPLAINED')}")
    for name in sorted(reasons.keys() & plain.keys() - different):
        lines.append(f"{name}: no longer different, take it out of {REASONS.name}")
    for what, found in (("Session", plain), ("RoutingSession", routed)):
        counts = ", ".join(f"{count:,} {outcome}" for outcome, count in Counter(found.values()).most_common())
        lines.append(f"{what}: {counts}")
    unexplained = frozenset(different - reasons.keys())
    lines.append(f"{len(different)} differences, {len(unexplained)} of them not explained")
    return lines, unexplained


if __name__ == "__main__":
    sys.exit(main())
