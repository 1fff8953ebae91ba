"""A real Slurm of several nodes on one machine, and runs on it that go through the failures of a cluster.

cluster: the Slurm. runs: one run, looked at from outside. failures: what is done to it. journeys: runs with several failures. campaign: many of them.
"""
