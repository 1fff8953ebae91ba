"""From one command to many nodes: a job is described once (spec), started on every node (node), and judged after every attempt (supervise)."""
