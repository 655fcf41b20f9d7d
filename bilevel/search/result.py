"""The result of a search."""

from scipy.optimize import OptimizeResult

from bilevel.messages import counted


class SearchResult(OptimizeResult):
    """An ``OptimizeResult`` whose text has neither ``state`` nor all of ``history``, because these are long.

    >>> print(SearchResult(fun=0.5, history=[1, 2], state={"points": []}))
         fun: 0.5
     history: 2 evaluations
    """

    def __repr__(self) -> str:
        short = {key: value for key, value in self.items() if key != "state"}
        if "history" in self:
            short["history"] = counted(len(self.history), "evaluation")
        return repr(OptimizeResult(short))
