"""The steps of docs/adopting.md do what the page says, in a service whose readers are late."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery, signals
from celery.contrib.testing.worker import start_worker
from fastapi.testclient import TestClient
from sqlalchemy.orm import DeclarativeBase, Mapped, close_all_sessions, mapped_column

from aurora_router import ReadOnlyViolation
from aurora_router.jobs import put_token, scope_of
from aurora_router.local import PostgresCluster
from tests.integration.shop import place, until_readers_serve

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STEPS = [block for block in BLOCK.findall((DOCS / "adopting.md").read_text()) if "from alembic" not in block]
(SIGNALS,) = (block for block in BLOCK.findall((DOCS / "web.md").read_text()) if "task_prerun" in block)

Service = Callable[..., Any]


@pytest.fixture
def service(cluster: PostgresCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """`service(words, consistency)` takes the page's steps up to the one that has these words, and returns the service's module.

    Before the first step the module has a mapped class and a job. The readers are late from the last step on.
    """
    cluster.execute("CREATE TABLE orders (id int PRIMARY KEY, item text)")
    cluster.execute("GRANT ALL ON orders TO app")
    cluster.wait_in_sync()
    module: Any = ModuleType("service")  # FastAPI looks annotations up in the module of a function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    celery = Celery("service", broker="memory://", backend="cache+memory://")
    celery.conf.update(broker_transport_options={"polling_interval": 0.01})

    class Base(DeclarativeBase):
        pass

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[int] = mapped_column(primary_key=True)
        item: Mapped[str]

    class Receipt:
        """A sender of the job that keeps the job's result for the test."""

        @staticmethod
        @celery.task(shared=False, name="receipt")
        def job(number: int) -> str:
            with module.Session(read_only=True) as s:
                return str(s.get_one(Order, number).item)

        def delay(self, number: int) -> None:
            module.sent = self.job.delay(number)

    vars(module).update(Order=Order, receipt=Receipt(), celery=celery, put_token=put_token, scope_of=scope_of)
    real = {
        "postgresql+psycopg://app:secret@db-1:5432/shop": cluster.url,
        "db-2:5432": cluster.readers[0].address,
        "db-3:5432": cluster.readers[1].address,
    }

    def take(words: str, consistency: str = "global") -> Any:
        real['consistency="global"'] = f"consistency={consistency!r}"
        for step in STEPS:
            for given, replaced in real.items():
                step = step.replace(given, replaced)
            exec(compile(step, "adopting.md", "exec", dont_inherit=True), vars(module))
            if words in step:
                break
        else:
            raise AssertionError(f"no step has {words!r}")
        until_readers_serve(module.router, 2)
        for reader in cluster.readers:
            cluster.pause_replay(reader)
        return module

    yield take
    close_all_sessions()
    module.router.close()
    for reader in cluster.readers:
        cluster.resume_replay(reader)
    cluster.execute("DROP TABLE orders")


@pytest.fixture
def wired() -> Iterator[Callable[[Any], None]]:
    """A function that connects Celery's signals as docs/web.md shows."""
    names: dict[str, Any] = {}

    def leave_logging_alone(**_: Any) -> None:
        """Keep the worker from setting the level of the root logger for all later tests."""

    def wire(module: Any) -> None:
        names.update(vars(module))
        exec(SIGNALS, names)

    signals.setup_logging.connect(leave_logging_alone)
    yield wire
    signals.setup_logging.disconnect(leave_logging_alone)
    signals.before_task_publish.disconnect(names["tell"])
    signals.task_prerun.disconnect(names["enter"])
    signals.task_postrun.disconnect(names["leave"])


def test_the_first_step_keeps_all_on_the_writer(service: Service) -> None:
    """The service reads nothing from a reader before a step says so."""
    shop = service("create_engine")
    with shop.Session() as s:
        s.get(shop.Order, 1)
        assert place(s) == "writer"


def test_declared_reads_use_readers_and_cannot_write(service: Service) -> None:
    """Declared reads see all commits of their process, however late the readers are."""
    shop = service("def reading()")
    for s in shop.reading():
        assert s.get(shop.Order, 1) is None
        assert place(s) == "reader"
        s.add(shop.Order(id=1, item="tea"))
        with pytest.raises(ReadOnlyViolation):
            s.flush()
    for s in shop.writing():
        s.add(shop.Order(id=1, item="tea"))
        s.commit()
    for s in shop.reading():
        assert s.get(shop.Order, 1).item == "tea"


def test_what_calls_the_application_sees_its_own_writes(service: Service, wired: Callable[[Any], None]) -> None:
    """The client and the job see the last request's write by their tokens alone, without the process's memory."""
    shop = service("def take(", consistency="session")
    wired(shop)
    with start_worker(shop.celery, pool="solo", perform_ping_check=False, shutdown_timeout=30):
        client = TestClient(shop.app)
        client.post("/orders/1?item=tea").raise_for_status()
        assert client.get("/orders/1").json() == "tea"
        assert shop.sent.get(timeout=20) == "tea"
        assert TestClient(shop.app).get("/orders/1").status_code == 404, "nobody has told another client"


def test_the_steps_to_the_end_are_a_service(cluster: PostgresCluster, service: Service) -> None:
    """After all steps the page's own test passes, and a change is a unit that may be run again."""
    shop = service("def test_an_order_is_shown")
    shop.receipt = ModuleType("receipt")
    shop.receipt.delay = lambda number: None
    shop.test_an_order_is_shown_to_who_took_it()
    with shop.Session() as s:
        s.get(shop.Order, 7)
        assert place(s) == "writer", "this process has written, and the readers are late"
    shop.change(1, "coffee")
    assert cluster.execute("SELECT item FROM orders") == [("coffee",)]
