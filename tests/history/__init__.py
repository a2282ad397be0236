"""Causal consistency, checked: history.py judges what clients were shown."""
