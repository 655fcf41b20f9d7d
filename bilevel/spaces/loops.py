"""Loops for backends that run Python step by step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def while_loop(live: Callable, body: Callable, state: Any, max_steps: int, check_every: int = 1) -> Any:
    """Repeat body while live(state), at most max_steps times. Read the flag every ``check_every`` steps."""
    for step in range(max_steps):
        if step % check_every == 0 and not live(state):
            break
        state = body(state)
    return state


def scan(
    body: Callable, state: Any, xs: Iterable[Any] | None, length: int, reverse: bool = False
) -> tuple[Any, list[Any]]:
    """Pass a state through ``length`` steps over xs. List the second result of each step, in the order of xs."""
    items = [None] * length if xs is None else list(xs)
    ys = []
    for item in reversed(items) if reverse else items:
        state, y = body(state, item)
        ys.append(y)
    return state, ys[::-1] if reverse else ys


def sequence(items: Sequence[Any]) -> Callable[[int], Any]:
    """Return i -> items[i modulo their number]."""
    return lambda i: items[i % len(items)]
