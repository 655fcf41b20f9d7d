"""A metagradient of 10,000 steps: its resident set, and its bits after being killed three times."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 10_000
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Return the bytes of the resident set."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def run(directory: str | None) -> None:
    """Differentiate the run. Print the resident set by the number of steps, and the digest of the result."""
    import torch

    import bilevel as bl
    from benchmarks.metagradients.torch_runs import Digits

    torch.set_num_threads(1)
    digits, done, sizes = Digits(), [0], []

    def batches(t: int) -> tuple[torch.Tensor, torch.Tensor]:
        done[0] += 1
        if done[0] % 1000 == 0:
            sizes.append(resident())
            print("at", done[0], sizes[-1], flush=True)
        return digits.x, digits.y

    training = bl.Training(digits.step, lambda state, weights: digits.validation(state[0]))
    first = digits.w, [torch.zeros_like(a) for a in digits.w]
    store = directory or "device"
    hg = bl.metagradient(
        training, first, digits.weights, batches, steps=STEPS, checkpoints="all", block=20, store=store
    )
    # The first backward pass adds some megabytes once, whatever the number of steps.
    phases = [part for part in (sizes[: STEPS // 1000], sizes[STEPS // 1000 :]) if part]
    growth = max(max(part) / min(part) for part in phases)
    print("digest", hashlib.sha256(hg.grad.numpy().tobytes()).hexdigest(), growth, flush=True)


def main() -> None:
    """Compare a run in memory with a run in a directory that is killed at three places."""
    start = time.time()
    command = [sys.executable, "-m", "benchmarks.metagradients.long_run"]
    whole = subprocess.run([*command, "memory"], capture_output=True, text=True, check=True).stdout.split("digest ")[1]
    seconds = time.time() - start
    with tempfile.TemporaryDirectory() as directory:
        killed = []
        for reads in (4_000, 3_000, 6_000):  # of batches, after which the process is killed
            with subprocess.Popen([*command, directory], stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith(f"at {reads} "):
                        process.send_signal(signal.SIGKILL)
                        killed.append(reads)
                        break
        last = subprocess.run([*command, directory], capture_output=True, text=True, check=True).stdout
        resumed = last.split("digest ")[1]
    same = whole.split()[0] == resumed.split()[0]
    growth = f"{float(whole.split()[1]):.2f} in memory, {float(resumed.split()[1]):.2f} in a directory"
    print(f"{STEPS} steps in {seconds:.0f} s. Largest over smallest resident set, forwards or backwards: {growth}.")
    print(f"Killed after {killed} batches, the same bits: {same}.")


if __name__ == "__main__":
    run(None if sys.argv[1] == "memory" else sys.argv[1]) if len(sys.argv) > 1 else main()
