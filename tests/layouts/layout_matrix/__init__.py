"""The matrix of layouts: every row trains one model on some layout of processes and is held against one process in float64.

rows: the list of layouts. reference: the one process. member: what each process of a layout does. server, pool: processes that need no
imports. compare: the verdict. faults: what must be found.
"""
