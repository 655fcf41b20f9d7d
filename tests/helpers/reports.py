"""Parts of a report of `bl.diagnose`."""


def words(report):
    """Return the text of a report in one line."""
    return " ".join(str(report).split())


def names(report):
    """Return the names of the findings, in order."""
    return [finding.name for finding in report.findings]


def text(report, name):
    """Return the description and the remedy of a finding."""
    return next((f.what, f.way_out) for f in report.findings if f.name == name)


def blamed(report):
    """Return the names of the derivatives that are wrong."""
    return {a.name for a in report.derivatives.of if a.wrong}
