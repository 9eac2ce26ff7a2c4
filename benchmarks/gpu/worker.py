"""The process in which the suite's cells run: answers requests on standard input, one line of JSON each.

``python -m benchmarks.gpu.worker --device cuda``. The device is synchronised after every request. If that fails, the
answer says so and the process ends, since an illegal access destroys the CUDA context; the suite continues in another
worker.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys

import torch

from .. import ceilings, measure, report, rivals, run, schedule
from ..workloads import Workload
from . import cells, native


class Server:
    """The requests, as methods. Keeps the operands of the last workload, which its rivals share."""

    def __init__(self, device: torch.device):
        self.device = device
        self.held: cells.DeviceCell | None = None

    def identify(self) -> dict:
        """The machine with the engine of position attention, the device's compute capability, what was built, and why
        the libraries cannot be used, if so."""
        engine = None
        try:
            import segattn_ops

            build, fault = segattn_ops.build_config(), native.fault(self.device)
            if fault is None:
                engine = native.position_engine(Workload("position", 1, 1, "bfloat16"), self.device)
        except Exception as error:  # such as operators with another tree's schemas
            build, fault = None, f"the libraries here cannot be used: {_reason(error)}"
        return {
            "machine": report.machine(str(self.device), torch.get_num_threads()) | {"position_engine": engine},
            "capability": torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else None,
            "build": build,
            "fault": fault,
        }

    def require_native(self) -> None:
        """Raises ``NotNative`` unless the package's kernels for the device are loaded."""
        native.require_native(self.device.type)

    def cell(self, workload: dict, rival: str, eager_errors: dict | None, run_eager: bool) -> dict:
        """One cell's record. Without ``eager_errors``, ``run_eager`` runs eager first, to compare the fused op with."""
        work = Workload(**workload)
        if reason := self._too_large(work, rival):
            return run.record(work, rival, "skipped", reason, self.device)
        if self.held is None or self.held.workload != work:
            self.held = None
            self.release()
        return cells.cell_record(work, rival, self._cell_of(work, eager_errors, run_eager), self.device)

    def _cell_of(self, work: Workload, eager_errors: dict | None, run_eager: bool):
        def made() -> cells.DeviceCell:
            self.held = self.held or cells.DeviceCell(work, self.device)
            self.held.eager_errors = eager_errors or self.held.eager_errors
            if run_eager and self.held.eager_errors is None and not self._too_large(work, "eager"):
                self.held.learn_eager()
            return self.held

        return made

    def _too_large(self, work: Workload, rival: str) -> str | None:
        # The operands already held count as available.
        held = work.operand_bytes() if self.held is not None and self.held.workload == work else 0
        needed = rivals.needed_bytes(work, rival, self.device)
        available = measure.available_bytes(str(self.device)) + held
        if needed <= schedule.MEMORY_SHARE * available:
            return None
        return f"would not fit: needs {needed / schedule.GIB:.1f} GiB, {available / schedule.GIB:.1f} GiB available"

    def sdpa(self, workload: dict) -> dict:
        return cells.sdpa_choice(Workload(**workload), self.device)

    def ceilings(self) -> dict:
        return ceilings.reached(self.device, None if self.device.type == "cuda" else "small")

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def answer(self, name: str, arguments: dict) -> dict:
        """``{"result": ...}``, ``{"error": reason}``, or ``{"crashed": reason}`` if the device is lost."""
        try:
            answer = {"result": getattr(self, name)(**arguments)}
        except Exception as error:  # of any kind: rivals raise many, and the next request must be served
            answer = {"error": _reason(error)}
        try:
            self.synchronize()
        except RuntimeError as error:
            return {"crashed": _reason(error)}
        return answer


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    # Rivals print to standard output too: answers get a separate descriptor.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(torch.device(arguments.device))
    for line in sys.stdin:
        request = json.loads(line)
        answer = server.answer(request["call"], request["arguments"])
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()
        if "crashed" in answer:
            os._exit(1)  # skips destructors, which would call the lost device
    return 0


if __name__ == "__main__":
    sys.exit(main())
