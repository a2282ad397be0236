"""Encrypted connections: the router's own work is done beneath TLS, and an untrusted certificate is a clear error."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from sqlalchemy import make_url, select, text

from aurora_router import ConfigurationError, Router
from aurora_router.local.cluster import Cluster
from tests.integration.shop import Item, place, raise_stock, sessions, set_up, stock, until_readers_serve
from tests.integration.test_silence import Background, until_cut

pytestmark = pytest.mark.engines("mariadb")


@pytest.fixture(scope="module")
def certificates() -> Iterator[Path]:
    """A directory of certificates that the servers can read as well.

    The servers show server.pem, which is issued by the authority ca.pem. The authority stranger.pem has issued nothing.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        authority = trustme.CA()
        authority.issue_cert("db.example").private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
        authority.cert_pem.write_to_path(directory / "ca.pem")
        trustme.CA().cert_pem.write_to_path(directory / "stranger.pem")
        (directory / "server.pem").chmod(0o644)
        yield directory


@pytest.fixture(scope="module")
def cluster(aurora_cluster_factory: Callable[..., Cluster[Any]], certificates: Path) -> Iterator[Cluster[Any]]:
    """A cluster that lets the application in on encrypted connections only."""
    server = str(certificates / "server.pem")
    cluster = aurora_cluster_factory(readers=2, settings={"ssl": "ON", "ssl_cert": server, "ssl_key": server})
    set_up(cluster)
    cluster.execute("ALTER USER app REQUIRE SSL")
    cluster.wait_in_sync()
    yield cluster
    cluster.stop()


def routed(cluster: Cluster[Any], authority: Path, **options: Any) -> Router:
    """A router that trusts this authority. It checks no host name, because the certificate has no address of the cluster."""
    url = make_url(cluster.url).update_query_dict({"ssl_ca": str(authority), "ssl_check_hostname": "false"})
    return Router(url, instances=[r.address for r in cluster.readers], probe_interval=0.1, **{"probe_timeout": 0.3, **options})


def test_all_traffic_is_encrypted_and_a_frozen_writer_is_left(cluster: Cluster[Any], certificates: Path) -> None:
    """All traffic of a router is encrypted, and a frozen writer is left all the same."""
    with routed(cluster, certificates / "ca.pem") as router:
        until_readers_serve(router, 2)
        router.init_commit_table()
        with sessions(router)() as s:
            assert s.scalar(select(Item.stock).where(Item.id == 1)) == 10
            assert place(s) == "reader"
            assert s.execute(text("SHOW STATUS LIKE 'Ssl_cipher'")).one()[1]
        assert router.run_transaction(sessions(router), raise_stock) == 11
        with router.connect() as connection:
            assert connection.execute(text("SHOW STATUS LIKE 'Ssl_cipher'")).one()[1]
            cluster.wait_in_sync()
            cluster.freeze(cluster.writer)
            stuck = until_cut(connection)
            raising = Background(lambda: router.run_transaction(sessions(router), raise_stock))
            cluster.promote()
            assert stuck.end().error is None
            assert (raising.end().error, raising.result) == (None, 12)
    assert stock(cluster) == 12


def test_an_untrusted_certificate_is_refused_with_advice(cluster: Cluster[Any], certificates: Path) -> None:
    """A server whose certificate is not trusted is not used, and the error says so."""
    cluster.heal()
    with (
        routed(cluster, certificates / "stranger.pem", probe_timeout=10.0) as router,
        pytest.raises(ConfigurationError, match="check the ssl options and the certificates") as caught,
    ):
        router.start()
    assert cluster.app_password not in str(caught.value)


def test_a_certificate_of_another_name_is_not_trusted(cluster: Cluster[Any], certificates: Path) -> None:
    """A certificate of another name is not trusted unless the URL says so."""
    cluster.heal()
    url = make_url(cluster.url).update_query_dict({"ssl_ca": str(certificates / "ca.pem")})
    with (
        Router(url, probe_timeout=10.0) as router,
        pytest.raises(ConfigurationError, match=r"IP address mismatch.*; check the ssl options"),
    ):
        router.start()


def test_without_an_authority_traffic_is_encrypted_unverified(cluster: Cluster[Any]) -> None:
    """Without a certificate authority connections are encrypted, and no certificate is verified."""
    cluster.heal()
    url = make_url(cluster.url).update_query_dict({"ssl_check_hostname": "false"})
    with Router(url) as router, router.connect() as connection:
        assert connection.execute(text("SHOW STATUS LIKE 'Ssl_cipher'")).one()[1]


def test_a_server_that_lets_nobody_in_unencrypted_says_so(cluster: Cluster[Any]) -> None:
    cluster.heal()
    url = make_url(cluster.url).update_query_dict({"ssl_disabled": "true"})
    with Router(url, probe_timeout=10.0) as router, pytest.raises(ConfigurationError, match="Access denied"):
        router.start()
