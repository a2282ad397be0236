"""PgBouncer before the servers of a cluster."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sqlalchemy import make_url

from aurora_router.local import LocalInstance

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

_SETTINGS = """\
[databases]
app = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own}
unix_socket_dir =
auth_type = plain
auth_file = {directory}/users
pool_mode = {mode}
default_pool_size = {size}
"""


@contextmanager
def pooler(instance: LocalInstance, *, mode: str = "transaction", size: int = 2) -> Iterator[str]:
    """Run a pooler before this instance during the block, and yield its address, "host:port". It leaves no file."""
    assert PROGRAM is not None
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgbouncer-")))
        with socket.create_server(("127.0.0.1", 0)) as free:
            own = free.getsockname()[1]
        (directory / "users").write_text(f'"app" "{make_url(instance.url).password}"\n')
        settings = _SETTINGS.format(host=instance.host, port=instance.port, own=own, directory=directory, mode=mode, size=size)
        (directory / "settings").write_text(settings)
        user = []
        if os.geteuid() == 0:  # PgBouncer refuses to run as root
            nobody = pwd.getpwnam("nobody")
            for path in (directory, *directory.iterdir()):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
            user = ["-u", "nobody"]
        process = subprocess.Popen([PROGRAM, "-q", *user, str(directory / "settings")], stderr=subprocess.DEVNULL)
        stack.callback(process.wait, 10)
        stack.callback(process.kill)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", own), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, "pgbouncer has ended"
                assert time.monotonic() < deadline, "pgbouncer does not listen"
                time.sleep(0.01)
        yield f"127.0.0.1:{own}"
