"""The instances and the connections to them: pools, probes, and the topology that the monitor publishes."""
