"""Runs whose processes Lightning spawns or forks, and what the process that called fit can say of them afterwards.

`python spawned.py FOLDER` writes FOLDER/seen.json: record, last step, its angle and summary, before and after each fit
of one callback, in this process and in processes of its own, and of copies of it.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

from ntkwatch import NTKWatch
from tests.support.runs import Classifier, loaders, trainer
from tests.support.trust_harness import quieten

STEPS = 4
FITS: dict[str, dict[str, Any]] = {
    "alone": {},
    "spawned": {"strategy": "ddp_spawn", "devices": 2},
    "forked": {"strategy": "ddp_fork", "devices": 2},
}


def said(watch: NTKWatch) -> dict[str, Any]:
    last = watch.last
    angle = None if last is None else last.metrics["kernel_angle"]
    told = {"record": str(watch.record), "step": None if last is None else last.step, "angle": angle}
    return {**told, "summary": watch.summary()}


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    quieten()
    watch = NTKWatch(probes=6, every=[0, 2], budget=None, on_error="raise")
    seen = {"before": said(watch)}
    for name, settings in FITS.items():
        fit = trainer(Path(folder) / name, watch, max_steps=STEPS, **settings)
        fit.fit(Classifier(norm=True), *loaders())
        seen[name] = said(watch)
    seen["a copy"], seen["sent"] = said(copy.deepcopy(watch)), said(pickle.loads(pickle.dumps(watch)))
    slim = NTKWatch(probes=6, every=[0, 2], budget=None, save_kernels=False)
    fit = trainer(Path(folder) / "without kernels", slim, max_steps=2, **FITS["forked"])
    fit.fit(Classifier(), *loaders())
    seen["without kernels"] = said(slim)
    (Path(folder) / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
