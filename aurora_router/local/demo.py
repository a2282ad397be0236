"""The demo: a small shop runs on a real cluster that loses its writer. The demo measures the effect on the shop.

Each figure is measured where it happens, and none comes from the router. The connection that ran a statement says on which
instance it ran. The cluster says which instance is the writer. At the end the acknowledged orders are looked up on the new
writer, past the router.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ForeignKey, String, event, func, select, update
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from aurora_router.config.settings import Consistency
from aurora_router.core import events
from aurora_router.errors import RouterError
from aurora_router.local import CLUSTERS
from aurora_router.local.cluster import Cluster
from aurora_router.local.demo_view import Picture, Row, Summary, View
from aurora_router.router import Router
from aurora_router.session import RoutingSession

CUSTOMERS = 100
PRODUCTS = 50
# Seconds by which one reader falls behind, so that a stale read is easy to get.
LAG = 0.3
OUTAGE = 1.0  # seconds from the writer's death to a reader's promotion

# -- the shop: it knows nothing of instances ------------------------------------------------------------------------


class Base(DeclarativeBase):
    """The shop's tables."""


class Customer(Base):
    """A customer."""

    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))


class Product(Base):
    """A product."""

    __tablename__ = "products"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(40))
    price: Mapped[int]


class Stock(Base):
    """The quantity of a product."""

    __tablename__ = "stock"
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id), primary_key=True)
    quantity: Mapped[int]


class Order(Base):
    """One sale.

    reference: drawn at random by the shop, because a number that is used twice could hide a lost order.
    """

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    reference: Mapped[str] = mapped_column(String(32), unique=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey(Customer.id), index=True)
    product_id: Mapped[int] = mapped_column(ForeignKey(Product.id))
    total: Mapped[int]


class Shop:
    """The service. Each thread serves one visitor after the other. A visitor is one session of several units."""

    def __init__(self, sessions: sessionmaker[RoutingSession], books: Books) -> None:
        self.stop = threading.Event()
        self._sessions = sessions
        self._books = books

    def open(self) -> None:
        """Fill the shelves."""
        with self._sessions.begin() as session:
            session.add_all(Customer(id=n, name=f"customer {n}") for n in range(1, CUSTOMERS + 1))
            session.add_all(Product(id=n, name=f"product {n}", price=100 * n) for n in range(1, PRODUCTS + 1))
            session.flush()
            session.add_all(Stock(product_id=n, quantity=1_000_000) for n in range(1, PRODUCTS + 1))

    def serve(self, thread: int) -> None:
        """Serve visitors until `stop` is set. An error ends the visit and is counted, and the next visitor comes in.

        Every fourth thread has visitors who only look around. They notice nothing of a lost writer.
        """
        rng, buying = random.Random(thread), 0.6 if (thread + 1) % 4 else 0.0
        while not self.stop.is_set():
            try:
                with self._sessions() as session, self._books.visit():
                    self._visit(session, rng, buying)
            except (SQLAlchemyError, RouterError) as error:
                self._books.failed(error)
                self._think(rng)

    def _visit(self, session: Session, rng: random.Random, buying: float) -> None:
        for _ in range(rng.randint(2, 6)):
            self._browse(session, rng)
            self._think(rng)
        if rng.random() < buying:
            customer = rng.randint(1, CUSTOMERS)
            reference = self._order(session, customer, rng)
            self._check_order(session, customer, reference)
            self._think(rng)

    def _browse(self, session: Session, rng: random.Random) -> None:
        first = rng.randint(1, PRODUCTS - 9)
        with self._books.unit(), session.begin():
            page = session.scalars(select(Product).where(Product.id.between(first, first + 9))).all()
            session.scalars(select(Stock).where(Stock.product_id.in_([product.id for product in page]))).all()

    def _order(self, session: Session, customer: int, rng: random.Random) -> str:
        reference = uuid.uuid4().hex
        with self._books.unit(), session.begin():
            product = session.get_one(Product, rng.randint(1, PRODUCTS))
            order = Order(reference=reference, customer_id=customer, product_id=product.id, total=product.price)
            session.add(order)
            session.execute(update(Stock).where(Stock.product_id == product.id).values(quantity=Stock.quantity - 1))
        self._books.acknowledged(reference)
        return reference

    def _check_order(self, session: Session, customer: int, reference: str) -> None:
        """Read the new order, and count the customer's orders. The new one must be there."""
        with self._books.unit(), session.begin():
            total = session.scalar(select(Order.total).where(Order.reference == reference))
            orders = session.scalar(select(func.count(Order.id)).where(Order.customer_id == customer))
        self._books.read_back(fresh=total is not None and bool(orders))

    def _think(self, rng: random.Random) -> None:
        self.stop.wait(rng.uniform(0.005, 0.03))


# -- the books: what happened, counted where it happens --------------------------------------------------------------


class Books:
    """The counts of what the shop's threads do. It is also a listener of the router, to show events live."""

    def __init__(self, cluster: Cluster[Any], view: View) -> None:
        self._cluster = cluster
        self._view = view
        self._names = {instance.address: instance.name for instance in cluster.instances}
        self._thread = threading.local()  # .place: the instance that ran the visit's last statement
        self._lock = threading.Lock()
        self.units: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        # The demo was interrupted, and causes later errors itself.
        self.closed = False
        self.reads_on_readers = 0
        self.checks = self.stale = 0
        self.orders: set[str] = set()
        self.opened = self.last_write = time.monotonic()
        self.longest_pause = 0.0
        self._waited: list[float] = []
        self._repeated: Counter[str] = Counter()
        self._rates = deque([(self.opened, self.units.copy())], maxlen=round(1 / view.interval))  # of the last second

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the statements that the engines of this process complete, in the threads that serve a visitor."""
        self.opened = self.last_write = time.monotonic()
        event.listen(Engine, "after_cursor_execute", self._executed)
        try:
            yield
        finally:
            event.remove(Engine, "after_cursor_execute", self._executed)

    @contextlib.contextmanager
    def visit(self) -> Iterator[None]:
        """Mark the statements of this thread as the shop's, not the monitor's."""
        self._thread.place = ""
        try:
            yield
        finally:
            del self._thread.place

    @contextlib.contextmanager
    def unit(self) -> Iterator[None]:
        """Count one unit of work when it is done, for the instance on which it ended."""
        yield
        with self._lock:
            self.units[self._thread.place] += 1

    def _executed(self, connection: Connection, _: Any, __: str, ___: Any, context: Any, ____: bool) -> None:
        if not hasattr(self._thread, "place") or context.compiled is None:
            return  # the monitor's statement, or one of SQLAlchemy's own
        url = connection.engine.url
        address = f"{url.host}:{url.port}"
        place = self._thread.place = self._names[address]
        with self._lock:
            if context.isinsert or context.isupdate or context.isdelete:
                self.writes[place] += 1
            else:
                self.reads[place] += 1
                self.reads_on_readers += address != self._cluster.writer.address

    def acknowledged(self, reference: str) -> None:
        """Count an order whose COMMIT has been answered."""
        with self._lock:
            self.orders.add(reference)
            now = time.monotonic()
            self.longest_pause = max(self.longest_pause, now - self.last_write)
            self.last_write = now

    def read_back(self, *, fresh: bool) -> None:
        """Count a session that looked for its own order."""
        with self._lock:
            self.checks += 1
            self.stale += not fresh

    def failed(self, error: Exception) -> None:
        """Count an error that reached the shop."""
        if self.closed:
            return
        with self._lock:
            self.errors[type(error).__name__] += 1
        self._view.note(f"an error reached the shop: {type(error).__name__}")

    def happened(self, what: events.Event) -> None:
        """Show an event of the router, as its listener. Frequent events are shown once a picture."""
        match what:
            case events.InstanceDown(instance):
                self._view.note(f"{self._name(instance)} is down")
            case events.InstanceUp(instance, role):
                self._view.note(f"{self._name(instance)} serves as a {role}")
            case events.WriterChanged(_, str(new), epoch):
                self._view.note(f"the writer is {self._name(new)} (epoch {epoch})")
            case events.WriterChanged():
                self._view.note("there is no writer: units that need one wait")
            case events.WaitedForWriter(seconds):
                with self._lock:
                    self._waited.append(seconds)
            case events.Repeated(instance):
                with self._lock:
                    self._repeated[self._name(instance)] += 1
            case _:
                pass

    def _name(self, address: str) -> str:
        return self._names.get(address, address)

    def picture(self, router: Router, phase: str) -> Picture:
        """Return the picture of this moment, for the view."""
        now, topology = time.monotonic(), router.topology
        with self._lock:
            waited, self._waited = self._waited, []
            repeated, self._repeated = self._repeated, Counter()
            then, before = self._rates[0]
            self._rates.append((now, self.units.copy()))
            rows = tuple(
                Row(
                    name=name,
                    address=address,
                    role=instance.role.value if instance.role is not None else "-",
                    health="healthy" if instance.healthy else "down",
                    lag=instance.lag,
                    rate=(self.units[name] - before[name]) / (now - then) if now > then else 0.0,
                    reads=self.reads[name],
                    writes=self.writes[name],
                )
                for address, name in self._names.items()
                if (instance := topology.by_id.get(address)) is not None
            )
            picture = Picture(now - self.opened, phase, rows, self.units.total(), self.stale, self.errors.total())
        if waited:
            self._view.note(f"{len(waited)} units have waited for the writer, up to {max(waited):.2f} s, and went on")
        for name, times in repeated.items():
            self._view.note(f"{times} reads or connections failed at {name} and were made elsewhere")
        return picture

    def summary(self, found: set[str], before_promotion: int) -> Summary:
        """Return the figures of the whole story.

        found: references of the orders that are in the database.
        before_promotion: how many orders there were before the promotion.
        """
        closed = time.monotonic()
        with self._lock:
            return Summary(
                seconds=closed - self.opened,
                units=self.units.total(),
                reads=self.reads.total(),
                reads_on_readers=self.reads_on_readers,
                checks=self.checks,
                stale=self.stale,
                orders=len(self.orders),
                lost=len(self.orders - found),
                after_promotion=len(self.orders) - before_promotion,
                errors=dict(self.errors),
                longest_pause=max(self.longest_pause, closed - self.last_write),
            )


# -- the story -------------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """The faults of the cluster, and their times.

    phase: what happens now, in words.
    """

    cluster: Cluster[Any]
    books: Books
    view: View
    seconds: float
    phase: str = ""
    before_promotion: int = 0

    def tell(self) -> None:
        """Tell the whole story. It takes about `seconds`."""
        old, late = self.cluster.writer, self.cluster.readers[-1]
        self._next("reads go to the readers, writes to the writer", until=0.2)
        self.cluster.set_lag(late, LAG)
        self._next(f"{late.name} replays {LAG * 1000:.0f} ms late: sessions that have just written keep away from it", until=0.4)
        self.cluster.kill(old)
        self._next(f"{old.name}, the writer, has been killed: reads go on, writes wait")
        time.sleep(OUTAGE)
        self.before_promotion = len(self.books.orders)
        new = self.cluster.promote()
        self._next(f"{new.name} has been promoted: writes go on", until=0.7)
        self._next(f"{old.name} is made a reader of {new.name}")
        self.cluster.rejoin(old)
        if late in self.cluster.readers:
            self.cluster.set_lag(late, 0)
        self._next(f"{old.name} is back as a reader", until=1.0)

    def _next(self, phase: str, until: float = 0.0) -> None:
        """Go on to a phase.

        until: the share of the demo's time after which the phase ends. 0: it ends at once. Any other phase lasts at least 0.5 s.
        """
        self.phase = phase
        self.view.note(f"* {phase}")
        if until:
            time.sleep(max(self.books.opened + until * self.seconds - time.monotonic(), 0.5))


def run(
    view: View, seconds: float = 20.0, threads: int = 8, consistency: Consistency = "session", engine: str = "postgresql"
) -> Summary:
    """Run the demo and return its figures.

    seconds: how long the shop is open.
    threads: how many threads serve visitors.
    engine: one of CLUSTERS.
    """
    with (
        view,
        CLUSTERS[engine](readers=2, synchronous=True, on_progress=view.starting) as cluster,
        contextlib.ExitStack() as stack,
    ):
        books = Books(cluster, view)
        router = stack.enter_context(
            Router(
                cluster.url,
                instances=[instance.address for instance in cluster.instances[1:]],
                consistency=consistency,
                failover_timeout=30.0,
                engine_options={"pool_size": threads},
                listeners=[books.happened],
            )
        )
        view.starting("opening the shop")
        with router.begin() as connection:
            Base.metadata.create_all(connection)
        shop = Shop(sessionmaker(class_=RoutingSession, router=router), books)
        shop.open()
        cluster.wait_in_sync()

        story = Story(cluster, books, view, seconds)
        stack.enter_context(books.watching())
        with _showing(view, router, story), ThreadPoolExecutor(threads, "shop") as pool:
            serving = [pool.submit(shop.serve, n) for n in range(threads)]
            try:
                story.tell()
            except BaseException:
                books.closed = True
                router.close()  # it ends all waits for a writer
                raise
            finally:
                shop.stop.set()
            for served in serving:
                served.result()
        found = {str(reference) for (reference,) in cluster.execute("SELECT reference FROM orders")}
        return books.summary(found, story.before_promotion)


@contextlib.contextmanager
def _showing(view: View, router: Router, story: Story) -> Iterator[None]:
    """Show a picture now and then while the story is told."""
    done = threading.Event()

    def show() -> None:
        while not done.wait(view.interval):
            with contextlib.suppress(RouterError):  # the router is being closed
                view.show(story.books.picture(router, story.phase))

    thread = threading.Thread(target=show, name="demo-view")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
