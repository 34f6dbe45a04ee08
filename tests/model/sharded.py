"""`lceval` for processes without devices: accelerate takes their CPU for one, and so spreads a model over them.

Without this accelerate reads an FSDP configuration, finds no devices and trains in plain data parallelism.
"""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from lceval.cli import main

begin = PartialState.__init__


def begin_with_devices(state: PartialState, *arguments: Any, **options: Any) -> None:
    begin(state, *arguments, **options)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = begin_with_devices  # type: ignore[method-assign]
    sys.exit(main())
