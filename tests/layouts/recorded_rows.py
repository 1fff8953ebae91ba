"""The layouts on which messages and memory are recorded, on four processes."""

from layout_matrix.rows import CP, EP, NO_SP, PP, TP, Row

from kan_train.config import Config

ETP, VPP = {"expert_tensor_parallel": 2}, {"virtual_pipeline": 2}

GROUPS_ROWS = [
    Row(world=4, zero=1, layout=TP, micro_batch=2),
    Row(world=4, zero=2, layout=EP),
    Row(world=4, zero=2, layout=CP, micro_batch=2, kind="hybrid"),
    Row(world=4, zero=1, layout=PP),
]
"""tp2sp+dp2, ep2, cp2 and pp2: the groups of these are looked at, and of all the others too."""

FAST_ROWS = [
    *GROUPS_ROWS,
    Row(world=4, zero=1, layout=TP | EP, micro_batch=2, recompute=True),
    Row(world=4, zero=2, layout=PP | VPP),
    Row(world=4, zero=3, layout=EP | TP, micro_batch=2, kind="hybrid"),
]

SLOW_ROWS = [
    Row(world=4, zero=0),
    Row(world=4, zero=1),
    Row(world=4, zero=3),
    Row(world=4, zero=0, layout=TP | ETP, micro_batch=2),
    Row(world=4, zero=1, layout=TP | NO_SP, micro_batch=2),
    Row(world=4, zero=2, layout=TP | NO_SP | ETP, micro_batch=2, kind="reuse"),
    Row(world=4, zero=2, layout=TP | ETP, micro_batch=2),
    Row(world=4, zero=2, layout=TP | EP, micro_batch=2, kind="edge"),
    Row(world=4, zero=2, layout=TP | ETP | EP, micro_batch=4, kind="edge"),
    Row(world=4, zero=2, layout=CP | TP, micro_batch=4, kind="dense"),
    Row(world=4, zero=1, layout=TP | CP, micro_batch=4, kind="hybrid", recompute=True),
    Row(world=4, zero=1, layout=TP | NO_SP, micro_batch=4, kind="dense", recompute=True),
    Row(world=4, zero=2, layout=PP | TP | NO_SP, micro_batch=4),
    Row(world=4, zero=2, layout=PP | EP, kind="reuse", recompute=True),
    Row(world=4, zero=2, layout=PP, precision="bf16"),
    Row(world=4, zero=1, precision="bf16"),
    Row(world=4, zero=1, layout=TP | EP, micro_batch=2, precision="bf16"),
    Row(world=4, zero=2, layout=EP | ETP | TP, micro_batch=4, precision="bf16"),
    Row(world=4, zero=3, layout=EP, micro_batch=2, precision="bf16"),
    Row(world=4, zero=3, layout=CP | TP, micro_batch=4),
]


def config(row: Row) -> Config:
    """The settings of a row; with context parallelism ADA also has a mixture, whose means cross the ranks."""
    found = row.config()
    if row.size("context_parallel") > 1:
        found.model.ada.mixture = 2
    return found
