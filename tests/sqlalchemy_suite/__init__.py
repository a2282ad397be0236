"""SQLAlchemy's own ORM tests with RoutingSession in the place of Session: see __main__."""
