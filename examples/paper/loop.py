"""A progress bar that goes on where a killed run stopped."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm


class Loop:
    """Count steps, keep rows of numbers, and save all that a PyTorch run consists of every so often.

    Args:
        path: of the checkpoint; it is removed at the end.
        steps: how many.
        state: what changes, by name: anything with a ``state_dict``, or tensors, which are restored in place.
        every: save after so many steps.
        about: what the run is, for the bar.
    """

    def __init__(self, path: Path, steps: int, state: dict[str, Any], every: int = 100, about: str = "") -> None:
        self.path, self.steps, self.state, self.every, self.about = path, steps, state, every, about
        self.rows: list[dict[str, Any]] = []
        self.cpu_seconds = 0.0
        self.done = False  # set it to end after the present step

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the steps that are left."""
        start = self._restore() if self.path.exists() else 0
        with tqdm(range(start, self.steps), self.about, self.steps, initial=start, unit="step") as self.bar:
            for step in self.bar:
                began = time.process_time()
                yield step
                self.cpu_seconds += time.process_time() - began
                if self.done:
                    break
                if (step + 1) % self.every == 0:
                    self._save(step + 1)
        self.path.unlink(missing_ok=True)

    def row(self, **values: float) -> None:
        """Keep a row of numbers, and show it."""
        self.rows.append({name: round(value, 6) for name, value in values.items()})
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})

    def history(self, **result: Any) -> dict[str, Any]:
        """Return the rows, and what came out in the end."""
        return {"rows": self.rows, "cpu_seconds": round(self.cpu_seconds, 2), "result": result}

    def _save(self, step: int) -> None:
        saved = {
            "step": step,
            "rows": self.rows,
            "cpu_seconds": self.cpu_seconds,
            "random": torch.get_rng_state(),
            "state": {k: v if isinstance(v, torch.Tensor) else v.state_dict() for k, v in self.state.items()},
        }
        partial = self.path.with_suffix(".partial")
        torch.save(saved, partial)
        os.replace(partial, self.path)

    def _restore(self) -> int:
        saved = torch.load(self.path, weights_only=True)
        for name, value in self.state.items():
            if isinstance(value, torch.Tensor):
                value.data.copy_(saved["state"][name])
            else:
                value.load_state_dict(saved["state"][name])
        torch.set_rng_state(saved["random"])
        self.rows, self.cpu_seconds = saved["rows"], saved["cpu_seconds"]
        return saved["step"]
