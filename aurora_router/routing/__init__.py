"""The units of work: where each goes, what it must see, and what becomes of its failures and its commits."""
