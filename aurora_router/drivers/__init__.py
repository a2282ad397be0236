"""One module per driver: how Python talks to a server. What a server says is in `servers`."""
