"""The reports of a router about itself: events for listeners, log lines, and numbers."""
