"""What a router tells of itself: events for listeners, lines of the log, and numbers."""
