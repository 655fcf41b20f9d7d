"""Time and memory of hypergradients, against hand-written loops and other libraries: python -m benchmarks.speed."""
