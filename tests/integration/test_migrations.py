"""Alembic as docs/adopting.md shows it: it migrates the writer, and leaves the router's own table alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import MetaData
from sqlalchemy.orm import declarative_base

from aurora_router import Router
from aurora_router.local.cluster import Cluster
from aurora_router.migrations import include_name
from tests.integration.shop import BOTH

GUIDE = Path(__file__).parents[2] / "docs" / "adopting.md"
(RECIPE,) = re.findall(r"^```python\n(from alembic import context.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def alembic(router: Router, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """An Alembic project with the guide's env.py, on a cluster that has the commit table."""
    application = ModuleType("shop")
    metadata = MetaData()
    with router.connect() as connection:
        metadata.reflect(connection, only=["item", "part"])
    vars(application).update(Base=declarative_base(metadata=metadata), router=router)
    monkeypatch.setitem(sys.modules, "shop", application)
    (tmp_path / "env.py").write_text(RECIPE)
    (tmp_path / "versions").mkdir()
    (tmp_path / "script.py.mako").write_text(
        "revision = ${repr(up_revision)}\ndown_revision = ${repr(down_revision)}\n"
        "from alembic import op\nimport sqlalchemy as sa\n"
        "def upgrade():\n    ${upgrades or 'pass'}\n\ndef downgrade():\n    ${downgrades or 'pass'}\n"
    )
    router.init_commit_table()
    config = Config()
    config.set_main_option("script_location", str(tmp_path))
    yield config
    with router.begin() as connection:
        for table in ("alembic_version", "aurora_router_commits", "added"):
            connection.exec_driver_sql(f"DROP TABLE IF EXISTS {table}")


@BOTH
def test_autogenerate_leaves_the_commit_table_alone(cluster: Cluster[Any], router: Router, alembic: Config) -> None:
    """The guide's env.py finds nothing to do about the table; without `include_name` Alembic would drop it."""
    made: Any = command.revision(alembic, "first", autogenerate=True)
    assert "aurora_router_commits" not in Path(made.path).read_text()  # Tables of other tests may be in it.
    with router.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), MetaData())
    assert any("aurora_router_commits" in str(each) for each in found), "the trap"


@BOTH
def test_a_migration_runs_on_the_writer(cluster: Cluster[Any], alembic: Config) -> None:
    made: Any = command.revision(alembic, "first")
    script = Path(made.path)
    body = "op.create_table('added', sa.Column('id', sa.Integer, primary_key=True))"
    script.write_text(script.read_text().replace("def upgrade():\n    pass", f"def upgrade():\n    {body}"))
    command.upgrade(alembic, "head")
    assert cluster.execute("SELECT count(*) FROM added") == [(0,)]
    assert cluster.execute("SELECT count(*) FROM alembic_version") == [(1,)]


def test_a_migration_may_leave_its_transaction(cluster: Cluster[Any], alembic: Config) -> None:
    """An autocommit block runs statements that PostgreSQL runs only outside of transactions."""
    made: Any = command.revision(alembic, "first")
    script = Path(made.path)
    body = "with op.get_context().autocommit_block(): op.execute('CREATE INDEX CONCURRENTLY named_by ON extra.named (name)')"
    cluster.execute("CREATE TABLE extra.named AS SELECT 1 AS name")
    cluster.execute("ALTER TABLE extra.named OWNER TO app")
    try:
        script.write_text(script.read_text().replace("def upgrade():\n    pass", f"def upgrade():\n    {body}"))
        command.upgrade(alembic, "head")
        assert cluster.execute("SELECT count(*) FROM pg_indexes WHERE indexname = 'named_by'") == [(1,)]
    finally:
        cluster.execute("DROP TABLE extra.named")


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [("aurora_router_commits", "table", False), ("orders", "table", True), ("aurora_router_commits", "schema", True)],
)
def test_only_the_table_of_the_router_is_left_out(name: str, kind: str, expected: bool) -> None:
    asked: Callable[..., bool] = include_name
    assert asked(name, kind, {}) is expected
