"""One kernel in a process whose address space is limited.

    python tests/support/memory_limits.py MODEL REDUCTION MIB FILE [blind]

takes the kernel of a model of `memory_models` with MIB of address space beyond what the process has mapped by then,
saves it to FILE, and prints {"chunk", "seconds", "error"}. `blind`: as if the system said nothing of the limit, so that
only running out of memory tells.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ntkwatch.engines import empirical_ntk, layerwise
from ntkwatch.model import batch_size, inputs_of, take
from tests.support import memory_models


def mapped() -> int:
    """Address space of this process, in bytes."""
    found = re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def run(name: str, reduction: Any, mib: int, file: str, blind: bool) -> dict[str, Any]:
    """The outcome of one kernel under the limit."""
    torch.set_num_threads(1)
    module, x = memory_models.build(name)
    empirical_ntk(module, take(x, slice(0, 3)), reduction=reduction)  # libraries are loaded, threads started
    sizes: list[int] = []
    module.register_forward_pre_hook(lambda m, args: sizes.append(batch_size(inputs_of(args[0]))))
    if blind:
        layerwise.limit_bytes = lambda device: 1 << 62
    if mib:
        resource.setrlimit(resource.RLIMIT_AS, (mapped() + (mib << 20), resource.RLIM_INFINITY))
    start, error = time.perf_counter(), ""
    try:
        kernel = empirical_ntk(module, x, reduction=reduction)
    except MemoryError as ran_out:
        error = str(ran_out)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if not error:
        torch.save(kernel, file)
    return {"chunk": sizes[-1] if sizes else 0, "seconds": time.perf_counter() - start, "error": error}


if __name__ == "__main__":
    name, reduction, mib, file, *rest = sys.argv[1:]
    print(json.dumps(run(name, reduction, int(mib), file, bool(rest))))
