"""A check of causal consistency: clients.py runs clients on a real cluster, history.py judges what they were shown."""
