"""In place of a training run: fast, without torch, and it says when and where it ran.

    python fake_trial.py FOLDER POINT

It logs a step every FAKE_SECONDS, goes on from the step where it was stopped or killed, saves on
SIGUSR1 (exit code 85), and fails where the point says so. Every start and end is a line of
``starts.jsonl`` two folders above.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

folder, point = Path(sys.argv[1]), json.loads(sys.argv[2])
steps, seconds = int(os.environ.get("FAKE_STEPS", "4")), float(os.environ.get("FAKE_SECONDS", "0"))
journal = (folder.parent.parent / "starts.jsonl").open("a")


def note(event: str, **more: object) -> None:
    cores = sorted(os.sched_getaffinity(0))
    record = {"event": event, "name": folder.name, "time": time.monotonic(), "cores": cores}
    journal.write(json.dumps(record | more) + "\n")
    journal.flush()


def leave(code: int, reason: str, step: int) -> None:
    (folder / "exit.json").write_text(json.dumps({"exit_code": code, "reason": reason}))
    note("end", code=code, step=step)
    os._exit(code)


asked: list[int] = []
signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))
lr = point.get("stages.pretrain.optimizer.lr", 1e-2)
metrics = folder / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
note("start", step=done, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"))
if lr == 0.5:
    print("no last words but these", flush=True)
    os._exit(9)
with metrics.open("a") as file:
    for step in range(done + 1, steps + 1):
        if asked:
            leave(85, "saved", step - 1)
        if lr == 0.7 and step == 2:
            leave(3, "gradients stayed non-finite", step)
        value = (math.log10(lr) + 2) ** 2 + 1 / step
        record = {"time": step, "stage": "pretrain", "step": step, "kind": "validation"}
        file.write(
            json.dumps(
                record | {"val_loss": value, "tokens": 8, "step_seconds": 1 / (step + 10 * lr)}
            )
            + "\n"
        )
        file.flush()
        time.sleep(seconds)
leave(0, "done", steps)
