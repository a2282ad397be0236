"""Mistakes that a type checker must see: each line that ends in an ignored error is one. Checked by mypy; never run."""

from sqlalchemy import create_engine, select
from sqlalchemy.orm import sessionmaker

from aurora_router import Decision, Reason, Router, RoutingSession, classify, events
from aurora_router.jobs import put_token
from aurora_router.middleware import AsgiMiddleware

URL = "postgresql+psycopg://db-1/shop"

router = Router(URL, instances=["db-2:5432"])
Router(URL, ["db-2:5432"])  # type: ignore[call-arg]
Router(URL, instance=["db-2:5432"])  # type: ignore[call-arg]
Router(URL, consistency="sesion")  # type: ignore[arg-type]
Router(URL, balance="x")  # type: ignore[arg-type]
Router(URL, balance=lambda readers: readers[0])  # type: ignore[arg-type, misc]
Router(URL, no_reader="wait")  # type: ignore[arg-type]
Router(URL, max_lag="1 s")  # type: ignore[arg-type]
Router(URL, failover_timeout=None)  # type: ignore[arg-type]
Router(URL, reader_endpoint=["db-ro:5432"])  # type: ignore[arg-type]
Router(URL, read_only_functions=[len])  # type: ignore[list-item]
Router(URL, engine_options=["pool_size"])  # type: ignore[arg-type]
Router(URL, listeners=print)  # type: ignore[arg-type]
router.connect(read_only="yes")  # type: ignore[arg-type]
router.explain(select(1))  # type: ignore[arg-type]
router.topology = router.topology  # type: ignore[misc]
router.topology.epoch = 2  # type: ignore[misc]
Decision(router.topology.writer, "a read")  # type: ignore[arg-type]
moved = events.Moved("db-2:5432", Reason.HINT, unit=7)
moved.at = 1.0  # type: ignore[misc]
moved.instance = "db-3:5432"  # type: ignore[misc]
events.Moved("db-2:5432")  # type: ignore[call-arg]
events.Moved("db-2:5432", Reason.HINT, unit="7")  # type: ignore[arg-type]
classify(b"SELECT 1")  # type: ignore[arg-type]
RoutingSession()  # type: ignore[call-arg]
RoutingSession(create_engine(URL), router=router)  # type: ignore[arg-type]
RoutingSession(router=URL)  # type: ignore[arg-type]
RoutingSession(router=router, read_only="yes")  # type: ignore[arg-type]
session = sessionmaker(class_=RoutingSession, router=router)()
session.execute("SELECT 1")  # type: ignore[call-overload]
session.scalars(select(1), bind_arguments=["read_only"])  # type: ignore[call-overload]
session.connection(execution_options="SERIALIZABLE")  # type: ignore[arg-type]
AsgiMiddleware(print, router)  # type: ignore[arg-type]
put_token(router, None)  # type: ignore[arg-type]
