"""What several test modules need."""

from collections.abc import Iterator

import pytest

from tests.unit.mysql_peer import Peer


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()
