"""Methods that differentiate the solution of the inner problem."""

from bilevel.methods.implicit import Implicit
from bilevel.methods.method import Level, Method, Pullback, Solution
from bilevel.methods.unrolled import Unrolled

__all__ = ["Implicit", "Level", "Method", "Pullback", "Solution", "Unrolled"]
