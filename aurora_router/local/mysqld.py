"""One server of MySQL's family, and the words in which MySQL and MariaDB differ."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aurora_router.core.positions import Position
from aurora_router.local.host import Server


@dataclass(frozen=True)
class Words:
    """The words of one of the two engines."""

    product: str
    source: str  # in statements, for example MASTER_HOST
    # In statements, settings and answers, for example STOP SLAVE and Slave_IO_Running.
    replica: str
    change: str  # begins the statement that sets a reader's writer
    by_gtid: str  # ends that statement: the reader continues by GTID
    written: str  # the writer's position, as SQL
    replayed: str  # the reader's position, as SQL
    received: str  # a reader's received position, in its status
    position: Callable[[str], Position]  # parses all three
    # The setting that makes a reader refuse writes, the superuser's too.
    read_only: str
    settings: Mapping[str, str]
    acknowledged: Mapping[str, str]  # settings with which a COMMIT waits for a reader
    monitor: str  # the privilege to see a reader's status
    # After these statements nothing is committed. Reads go on, and the status still shows a running replication.
    pause: Sequence[str]
    resume: str
    appliers: str  # SQL for the numbers of the threads that replay


class Mysqld(Server):
    """One mysqld or mariadbd."""

    ending = signal.SIGTERM
    stands_by = False
    _log_began = 0

    def launch(self, program: Path, settings: Mapping[str, str], *options: str) -> None:
        """Start the server. `wait_ready` waits until it accepts connections."""
        self._log_began = self.log.stat().st_size if self.log.exists() else 0
        options = ("--no-defaults", f"--datadir={self.data}", *options, *(f"--{name}={v}" for name, v in settings.items()))
        self.process = self._host.spawn(self.log, program, *options)
        self.frozen = False

    @property
    def ready(self) -> bool:
        """Whether the server accepts connections. It writes that into its log."""
        if not self.running:
            return False
        with self.log.open("rb") as log:
            log.seek(self._log_began)
            return b": ready for connections" in log.read()
