"""Kill `python train.py mot` at 30 random moments (SIGKILL), and go on each time with --resume.

    python tests/kill.py            about five minutes; not part of the test suite

After every kill the checkpoint must load and hold a step that is no earlier than before; at the end
the run must have the very weights of one that was never killed.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoints import load_checkpoint

KILLS, STEPS = 30, 600
OPTIONS = ["--data", "pictures", "--autoencoder-steps", "5", "--cases", "4", "--batch-size", "4",
           "--save-every", "3", "--steps", str(STEPS)]


def start(out, *more):
    return subprocess.Popen(
        [sys.executable, ROOT / "train.py", "mot", *OPTIONS, "--out", out, *more],
        env={**os.environ, "TORCH_COMPILE_DISABLE": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)


def main():
    chance = random.Random(0)
    os.chdir(tempfile.mkdtemp())
    Path("pictures").mkdir()
    rng = np.random.default_rng(0)
    with open("pictures/metadata.jsonl", "w") as metadata:
        for n in range(20):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(f"pictures/{n}.png")
            metadata.write(f'{{"file_name": "{n}.png", "text": "number {n}"}}\n')
    assert start("straight").wait() == 0
    step, path = 0, Path("killed/checkpoint.pt")
    for kill in range(KILLS):
        process = start("killed", *["--resume"] * path.is_file())
        before = path.stat().st_mtime_ns if path.is_file() else 0
        while process.poll() is None and not (path.is_file() and path.stat().st_mtime_ns > before):
            time.sleep(0.01)            # until it has saved once more; then at any moment
        time.sleep(chance.uniform(0, 0.5))
        assert process.poll() is None, f"the run ended before kill {kill + 1}: give it more STEPS"
        process.kill()
        process.wait()
        before, step = step, load_checkpoint("killed")["step"]
        assert step >= before, f"step {step} after step {before}"
        print(f"kill {kill + 1}: the checkpoint is whole, at step {step}", flush=True)
    assert start("killed", "--resume").wait() == 0
    one, other = (load_checkpoint(run) for run in ("straight", "killed"))
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])
    print("and the run ended with the weights of one that was never killed")


if __name__ == "__main__":
    main()
