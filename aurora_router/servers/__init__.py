"""One module per server family: the SQL that asks, and how rows and error codes read. Text and parsing, no I/O."""
