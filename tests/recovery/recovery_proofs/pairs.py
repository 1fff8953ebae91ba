"""Pairs of layouts, run: each layout that saves runs once, whatever goes on with its checkpoint; so does the one process they are held against."""

import shutil
from pathlib import Path

from layout_matrix.pool import Pool, Run
from layout_matrix.reference import Reference, train

from kan_train.checkpoint.retention import step_folder
from recovery_proofs.layouts import LAYOUTS, SAVED, Pair, configuration, open_data, read_all
from recovery_proofs.verdict import Verdict, Whole, judge

TASK = "recovery_proofs.member:train_part"


class Pairs:
    """Runs pairs in the processes of a pool."""

    def __init__(self, pool: Pool, corpora: Path, folder: Path) -> None:
        self.pool, self.corpora, self.folder = pool, corpora, folder
        self._saved: dict[str, Run] = {}
        self._whole: dict[str, Whole] = {}

    def whole(self, kind: str) -> Whole:
        """The run of one process that is never stopped, of the layouts of a kind of model."""
        if kind not in self._whole:
            row = next(row for row in LAYOUTS.values() if row.kind == kind)
            config = configuration(row, self.corpora)
            samples = read_all(open_data(config).loader(config.train.global_batch_size, config.train.global_batch_size, 0, 1))
            reference = train(row, config.model, samples)
            reference.save(self.folder / kind)
            self._whole[kind] = Whole(Reference.load(self.folder / kind), samples)
        return self._whole[kind]

    def saved(self, layout: str) -> Run:
        """The run of a layout that saves after SAVED steps and goes on."""
        if layout not in self._saved:
            self._saved[layout] = self._run(layout, self.folder / f"saving-{layout}")
        return self._saved[layout]

    def judge(self, pair: Pair, fault: str | None = None) -> Verdict:
        """Run the layout that loads, and judge the pair. fault: key of FAULTS, planted in it."""
        saved, folder = self.saved(pair.saving), self.folder / "loading"
        shutil.rmtree(folder, ignore_errors=True)
        loaded = self._run(pair.loading, folder, origin=str(step_folder(saved.folder, SAVED)), fault=fault)
        return judge(pair, saved, loaded, self.whole(LAYOUTS[pair.loading].kind))

    def _run(self, layout: str, folder: Path, **more: str | None) -> Run:
        row = LAYOUTS[layout]
        self.whole(row.kind)
        arguments = {"layout": layout, "corpora": str(self.corpora), "choices": str(self.folder / row.kind / "tensors.safetensors"), **more}
        return self.pool.call(TASK, row, folder, arguments, seconds=120)
