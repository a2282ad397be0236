"""Decisions: pure functions on frozen values. No clock, randomness, thread, socket, logging or SQLAlchemy in here."""
