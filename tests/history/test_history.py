"""50,000 operations with faults on a real cluster violate nothing, nor do 10,000 on MariaDB. Planted bugs are found there.

For more operations: `python -m tests.history --operations N`, or AURORA_ROUTER_OPERATIONS=N pytest tests/history.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from aurora_router.core import selection
from aurora_router.core.token_codec import Token
from aurora_router.local.cluster import Cluster
from aurora_router.routing.token_signing import Tokens
from tests.history.clients import run
from tests.history.history import Guarantee, check
from tests.integration.shop import BOTH

OPERATIONS = int(os.environ.get("AURORA_ROUTER_OPERATIONS", "50000"))
WITHIN = 6_000  # operations within which a planted bug must be found

pytestmark = [pytest.mark.timeout(120 + OPERATIONS // 100), pytest.mark.no_cover]  # it does the same again and again


@pytest.fixture(scope="module")
def cluster(aurora_cluster_factory: Callable[..., Cluster[Any]]) -> Cluster[Any]:
    """A cluster that loses no acknowledged commit."""
    return aurora_cluster_factory(readers=2, synchronous=True)


def found(cluster: Cluster[Any], **options: Any) -> set[Guarantee]:
    """The guarantees that are violated while readers are late and nobody is promoted."""
    cluster.heal()
    return {violation.guarantee for violation in check(run(cluster, WITHIN, promotions=0, **options).history)}


@BOTH
def test_no_client_is_shown_less_than_is_due_under_faults(cluster: Cluster[Any], aurora_engine: str) -> None:
    """No client is shown less than is due, whatever happens to the cluster."""
    operations = OPERATIONS if aurora_engine == "postgresql" else OPERATIONS // 5
    cluster.heal()
    done = run(cluster, operations)
    violations = check(done.history)
    assert violations == [], "\n".join([f"{len(violations)} violations", *map(str, violations[:20]), str(done.counts)])
    # Without these checks, all might hold only because nothing is read on readers, nothing happens, or nothing succeeds.
    assert done.operations >= operations
    assert done.counts["reads on readers"] > operations / 8
    assert done.counts["writes"] > operations / 20
    assert done.counts["killed"] + done.counts["replaced"] >= min(operations // 20_000, 2)
    assert sum(count for what, count in done.counts.items() if what.startswith("failed")) < operations / 100


def test_clocks_that_are_seconds_ahead_violate_nothing(cluster: Cluster[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts whose clocks are 5 s ahead of the clock that dated a token show all that its position speaks of."""
    read = Tokens.read

    def read_ahead(tokens: Tokens, text: str, *rest: Any) -> Any:
        token = Token.parse(text)
        if token.position is not None:  # otherwise the token has only its date
            text = str(token._replace(made_at=token.made_at - 5000))
        return read(tokens, text, *rest)

    monkeypatch.setattr(Tokens, "read", read_ahead)
    assert found(cluster) == set()


def test_without_consistency_every_guarantee_is_violated(cluster: Cluster[Any]) -> None:
    assert found(cluster, consistency="eventual") == set(Guarantee) - {Guarantee.ONE_ORDER}


def test_a_reader_that_is_believed_to_have_everything_is_found(cluster: Cluster[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "satisfies_requirement", lambda *_: True)
    assert Guarantee.READ_YOUR_WRITES in found(cluster)


def test_a_reader_that_shows_less_than_another_did_is_found(cluster: Cluster[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "satisfies_monotonic_read", lambda *_: True)
    assert Guarantee.MONOTONIC_READS in found(cluster)


def test_tokens_that_nobody_heeds_are_found(cluster: Cluster[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokens, "read", lambda *_: None)
    assert Guarantee.READ_YOUR_WRITES in found(cluster)
