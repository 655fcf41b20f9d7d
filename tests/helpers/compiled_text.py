"""Find collectives and loops in the text of a compiled program."""

import re
from math import prod

COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def collectives(text):
    """Return the collectives of a compiled program, by kind, with the shapes of their results."""
    found = {}
    for shape, kind in re.findall(rf"= (.+?) ({COLLECTIVES})(?:-start)?\(", text):
        found.setdefault(kind, []).append(shape)
    return found


def loops(text):
    """Return the lines of a compiled program that run in loops."""
    computations = dict(re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    names, found = re.findall(r" while\(.*body=%?([\w.\-]+)", text), {}
    while names:
        if (name := names.pop()) in computations and name not in found:
            found[name] = computations[name]
            names += re.findall(r"(?:calls|body|condition|to_apply|branch_computations)=\{?%?([\w.\-]+)", found[name])
    return "".join(found.values())


def entries(shape):
    """Return the largest number of entries of the arrays in the shape of a result."""
    sizes = [dims.split(",") for dims in re.findall(r"\[([\d,]*)\]", shape)]
    return max(prod(int(n) for n in dims if n) for dims in sizes)
