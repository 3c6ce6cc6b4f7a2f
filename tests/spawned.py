"""A run whose processes Lightning spawns or forks, and what the process that called fit can say of it afterwards.

`python spawned.py STRATEGY FOLDER` writes FOLDER/seen.json: record, last step, summary, at the start and after each of
two fits, the first in this process, the second in two processes of its own.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

from runs import Classifier, loaders, trainer
from trust_harness import quieten

from ntkwatch import NTKWatch

STEPS = 4


def said(watch: NTKWatch) -> dict[str, Any]:
    last = watch.last
    angle = None if last is None else last.metrics["kernel_angle"]
    told = {"record": str(watch.record), "step": None if last is None else last.step, "angle": angle}
    return {**told, "summary": watch.summary()}


def main(strategy: str, folder: str) -> None:
    warnings.simplefilter("ignore")
    quieten()
    watch = NTKWatch(probes=6, every=[0, 2], budget=None, on_error="raise")
    seen = {"before": said(watch)}
    for name, settings in {"alone": {}, "spawned": {"strategy": strategy, "devices": 2}}.items():
        fit = trainer(Path(folder) / name, watch, max_steps=STEPS, **settings)
        fit.fit(Classifier(norm=True), *loaders())
        seen[name] = said(watch)
    seen["a copy"], seen["sent"] = said(copy.deepcopy(watch)), said(pickle.loads(pickle.dumps(watch)))
    slim = NTKWatch(probes=6, every=[0, 2], budget=None, save_kernels=False)
    trainer(Path(folder) / "slim", slim, max_steps=2, strategy=strategy, devices=2).fit(Classifier(), *loaders())
    seen["without kernels"] = said(slim)
    (Path(folder) / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
