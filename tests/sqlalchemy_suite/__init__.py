"""SQLAlchemy's own ORM tests with RoutingSession in place of Session: see __main__."""
