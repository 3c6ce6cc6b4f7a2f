"""Tensors that checkpoints refer to, kept beside a record: whole or not at all, and the oldest let go at a limit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ntkwatch.record.format import TEMPORARY, RecordError, load_tensors, path_inside, save_tensors

FORECASTS = "forecasts"  # the folder beside a record for the linear models of its checkpoints
MAX_BYTES = 4 * 1024**3  # in all; the newest two are kept whatever they take
MAX_FILES = 1000
MIN_FILES = 2


class TensorStore:
    """A folder of tensor files, one a checkpoint: the newest 1,000 within 4 GiB, and the newest two in any case.

    What a checkpoint carries of it is a name and a checksum; the checkpoint itself stays small.
    """

    def __init__(self, folder: Path, kept_bytes: int = MAX_BYTES, kept_files: int = MAX_FILES) -> None:
        self.folder, self._bytes, self._files = folder, kept_bytes, kept_files

    def put(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Keep the tensors of a step; returns what `get` finds them by. Raises OSError where the disk does not."""
        name = self._free_name(step)
        entry = {"name": name, "sha256": save_tensors(self.folder, name, tensors)}
        self._let_go()
        return entry

    def get(self, entry: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors that `put` returned the entry for; RecordError where they were let go, lost or changed."""
        if not path_inside(self.folder, f"{entry['name']}.safetensors").exists():
            raise RecordError(
                f"{self.folder} no longer holds {entry['name']}: it keeps the newest {self._files} files within "
                f"{self._bytes / 1024**3:.0f} GiB; resume from a later checkpoint"
            )
        return load_tensors(self.folder, entry["name"], entry["sha256"])

    def _free_name(self, step: int) -> str:
        """A file is never written over: another branch of the run may have been at this step, and be resumed."""
        name, attempt = f"step_{step:08d}", 1
        while path_inside(self.folder, f"{name}.safetensors").exists():
            name, attempt = f"step_{step:08d}_{attempt}", attempt + 1
        return name

    def _let_go(self) -> None:
        for left_over in self.folder.glob(TEMPORARY):  # of a writer that was killed
            left_over.unlink(missing_ok=True)
        files = [(path.stat(), path) for path in self.folder.glob("*.safetensors")]
        files.sort(key=lambda file: (file[0].st_mtime_ns, file[1].name), reverse=True)
        size = 0
        for i, (stat, path) in enumerate(files):
            size += stat.st_size
            if i >= MIN_FILES and (i >= self._files or size > self._bytes):
                path.unlink(missing_ok=True)
