"""Clusters of containers: one writer and two readers, each at an address of its own, and faults of machines and networks.

They offer the methods that the contract tests use of aurora_router.local's clusters, and two losses more. An instance may be shut
down in an orderly way, and its network may be cut. A container that comes back has its address and its data.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from itertools import islice
from typing import Any, ClassVar, Self

from docker.models.containers import Container
from docker.types import IPAMConfig, IPAMPool
from testcontainers.core.container import DockerContainer
from testcontainers.core.docker_client import DockerClient
from testcontainers.core.network import Network

DATABASE = APP = "app"
NAMES = ("db-1", "db-2", "db-3")

LOSSES = {"kill": "restart", "shut_down": "restart", "freeze": "thaw", "isolate": "reconnect"}
"""The ways to lose an instance, by the name of a cluster's method, each with the method that brings the instance back."""


@dataclass(frozen=True)
class ContainerInstance:
    """A container of a cluster, by its address in the containers' network."""

    name: str
    host: str
    port: int

    @property
    def address(self) -> str:
        """`host:port`, as `Router(instances=[...])` takes it."""
        return f"{self.host}:{self.port}"


class ContainerCluster(ABC):
    """A cluster of any kind of server: containers, addresses, losses. Subclasses set up their servers and the replication."""

    image: ClassVar[str]
    port: ClassVar[int]
    scheme: ClassVar[str]

    def __init__(self) -> None:
        self.password = secrets.token_hex(12)
        self.instances: Sequence[ContainerInstance] = ()
        self._docker = DockerClient().client
        self._network: Network | None = None
        self._containers: dict[str, DockerContainer] = {}
        self._writer: ContainerInstance | None = None
        self._deposed: set[ContainerInstance] = set()

    # -- for each kind of server

    @abstractmethod
    def _container(self, instance: ContainerInstance, **options: Any) -> DockerContainer:
        """Make the container of an instance without data, not started. The `options` are those of DockerContainer."""

    @abstractmethod
    def _set_up(self) -> None:
        """Start all containers and let the readers follow the writer."""

    @abstractmethod
    def _connect(self, instance: ContainerInstance) -> Any:
        """A driver's connection as superuser, in autocommit."""

    @abstractmethod
    def _promote(self, instance: ContainerInstance, followers: Sequence[ContainerInstance]) -> None:
        """Make a running reader the writer, and let the followers follow it."""

    @abstractmethod
    def _rejoin(self, instance: ContainerInstance) -> None:
        """Make a running instance that was deposed a reader of the writer."""

    @abstractmethod
    def wait_in_sync(self) -> None:
        """Wait until all readers show the writer's data."""

    # -- instances

    @property
    def writer(self) -> ContainerInstance:
        """The instance that was promoted last (at first the first), running or not."""
        assert self._writer is not None
        return self._writer

    @property
    def readers(self) -> Sequence[ContainerInstance]:
        """All other instances except deposed writers."""
        return [i for i in self.instances if i != self._writer and i not in self._deposed]

    @property
    def url(self) -> str:
        """SQLAlchemy URL of the writer for the application's user."""
        return f"{self.scheme}://{APP}:{self.password}@{self.writer.address}/{DATABASE}"

    def execute(self, query: str, *args: Any, instance: ContainerInstance | None = None) -> list[tuple[Any, ...]]:
        """Run a statement as superuser in the application's database, on the writer or on `instance`. Returns its rows."""
        connection = self._connect(instance or self.writer)
        try:
            cursor = connection.cursor()
            cursor.execute(query, args or None)
            return [tuple(row) for row in cursor.fetchall()] if cursor.description else []
        finally:
            connection.close()

    # -- life

    def __enter__(self) -> Self:
        try:
            self._make_network()
            self._set_up()
            self.wait_in_sync()
        except BaseException:  # also after Ctrl-C, nothing may be left behind
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove all containers, and their network."""
        for container in self._containers.values():
            container.stop()
        if self._network is not None:
            self._network.remove()
        self._docker.close()

    def _make_network(self) -> None:
        # A container keeps its address only in a network with a chosen subnet. Docker knows which subnets are free, so let a
        # first network find one.
        with Network() as network:
            subnet = next(
                c["Subnet"] for c in self._docker.networks.get(network.name).attrs["IPAM"]["Config"] if "." in c["Subnet"]
            )
        self._network = Network(docker_network_kw={"ipam": IPAMConfig(pool_configs=[IPAMPool(subnet=subnet)])}).create()
        hosts = islice(ip_network(subnet).hosts(), 10, None)
        self.instances = [ContainerInstance(name, str(host), self.port) for name, host in zip(NAMES, hosts, strict=False)]
        self._writer = self.instances[0]

    def _start(self, instance: ContainerInstance) -> None:
        """Start a container in place of an older one of the same name."""
        if instance.name in self._containers:
            self._containers.pop(instance.name).stop()
        assert self._network is not None
        at = {self._network.name: self._docker.api.create_endpoint_config(ipv4_address=instance.host)}
        container = self._container(instance, network=self._network, networking_config=at, hostname=instance.name)
        self._containers[instance.name] = container
        container.start()

    def _wait_ready(self, instance: ContainerInstance) -> None:
        """Wait until the instance takes connections from outside. It takes none while the image sets itself up."""

        def answers() -> bool:
            assert self._of(instance).status == "running", self._of(instance).logs(tail=20).decode()
            try:
                self._connect(instance).close()
            except Exception:
                return False
            return True

        until(answers, f"{instance.name} to take connections", timeout=100)

    def _of(self, instance: ContainerInstance) -> Container:
        """The container of an instance, in its present state."""
        container = self._containers[instance.name].get_wrapped_container()
        container.reload()
        return container

    # -- faults

    def promote(self) -> ContainerInstance:
        """Make a reader the writer, and let the other one follow it. Returns the new writer once it takes writes.

        Either reader will do if they were in sync. The old writer is left as it is.
        """
        new, *followers = self.readers
        self._promote(new, followers)
        self._deposed.add(self.writer)
        self._writer = new
        return new

    def kill(self, instance: ContainerInstance) -> None:
        """Kill the container. It is gone at once, and its address with it."""
        self._of(instance).kill()

    def shut_down(self, instance: ContainerInstance) -> None:
        """Ask the container to stop, so that the server ends its connections in an orderly way."""
        self._of(instance).stop(timeout=20)

    def restart(self, instance: ContainerInstance) -> None:
        """Start the container again in its old role."""
        self._of(instance).start()
        self._wait_ready(instance)

    def freeze(self, instance: ContainerInstance) -> None:
        """Stop all its processes. Connections are accepted, but nothing answers."""
        self._of(instance).pause()

    def thaw(self, instance: ContainerInstance) -> None:
        """Let a frozen instance go on."""
        self._of(instance).unpause()

    def isolate(self, instance: ContainerInstance) -> None:
        """Cut its network. Nobody is at its address, and connects get no answer."""
        self._docker.networks.get(self._network_name).disconnect(self._of(instance))

    def reconnect(self, instance: ContainerInstance) -> None:
        """Undo `isolate`."""
        self._docker.networks.get(self._network_name).connect(self._of(instance), ipv4_address=instance.host)

    def heal(self) -> None:
        """Make the cluster whole: all instances run and are connected, and the readers are in sync with the writer."""
        for instance in self.instances:
            container = self._of(instance)
            if container.status == "paused":
                self.thaw(instance)
            if not container.attrs["NetworkSettings"]["Networks"]:
                self.reconnect(instance)
            if container.status == "exited":
                self.restart(instance)
        for instance in tuple(self._deposed):
            self._rejoin(instance)
            self._deposed.discard(instance)
        self.wait_in_sync()

    @property
    def _network_name(self) -> str:
        assert self._network is not None
        return self._network.name


def until(condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
    """Wait until the condition holds.

    Raises TimeoutError, which names `what`, after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.05)
