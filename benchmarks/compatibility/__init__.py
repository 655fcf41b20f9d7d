"""Check the second derivatives of other packages, for docs/compatibility.md: `make compatibility`."""
