"""A listener that checks the promise of events: whatever begins has one end."""

from __future__ import annotations

from collections import Counter

from aurora_router.core import events

Key = tuple[object, ...]


def begun_by(event: events.Event) -> Key | None:
    """What an event begins."""
    match event:
        case events.CheckoutStarted():
            return "checkout", event.unit
        case events.Routed():
            return "stay", event.unit, event.instance, event.connection
        case events.WaitStarted():
            return "wait", event.unit, event.what
        case events.AttemptStarted():
            return "attempt", event.transaction, event.number
        case events.ConnectionCreated():
            return "connection", event.instance, event.connection
        case events.ProbeStarted():
            return "probe", event.instance
        case _:
            return None


def ended_by(event: events.Event) -> Key | None:
    """What an event ends."""
    match event:
        case events.Routed() | events.CheckoutFailed():
            return "checkout", event.unit
        case events.ConnectionCheckedIn():
            return "stay", event.unit, event.instance, event.connection
        case events.WaitEnded():
            return "wait", event.unit, event.what
        case events.AttemptEnded():
            return "attempt", event.transaction, event.number
        case events.ConnectionClosed():
            return "connection", event.instance, event.connection
        case events.ProbeSucceeded() | events.ProbeFailed():
            return "probe", event.instance
        case _:
            return None


class Pairs:
    """A listener of one router.

    heard: the events, in order.
    """

    def __init__(self) -> None:
        self.heard: list[events.Event] = []

    def __call__(self, event: events.Event) -> None:
        self.heard.append(event)

    def check(self) -> Counter[object]:
        """Check that all that has begun has ended, and return how often each kind of it has.

        Call it when the router is closed, and no unit has a connection any more.
        """
        under_way: Counter[Key] = Counter()
        done: Counter[object] = Counter()
        for event in self.heard:
            ended, begun = ended_by(event), begun_by(event)
            if ended is not None:
                assert None not in ended, f"nobody knows what {event} ends"
                assert under_way[ended], f"{event} ends what has not begun, or has ended before"
                under_way[ended] -= 1
                done[ended[0]] += 1
            if begun is not None:
                assert None not in begun, f"nobody knows what {event} begins"
                assert not under_way[begun], f"{event} begins what is under way"
                under_way[begun] += 1
            if isinstance(event, events.CheckoutStarted) and event.transaction is not None:
                attempts = [key for key in +under_way if key[:2] == ("attempt", event.transaction)]
                assert len(attempts) == 1, f"nobody knows to which of the attempts {attempts} {event} belongs"
        assert not +under_way, f"it has begun and not ended: {[*+under_way]}"
        self._check_transactions()
        return done

    def _check_transactions(self) -> None:
        """Check that all events of a unit name the same transaction."""
        transactions: dict[int, int | None] = {}
        for event in self.heard:
            unit: int | None = getattr(event, "unit", None)
            if unit is not None:
                named: int | None = getattr(event, "transaction", None)
                assert transactions.setdefault(unit, named) == named, f"{event} is of another transaction than before"
