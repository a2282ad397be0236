"""Causal consistency, checked: history.py judges what clients were shown, clients.py has them shown it on a real cluster."""
