"""A seeded simulation of the pure core: see simulation.py. `python -m tests.simulation SEED` replays one seed."""
