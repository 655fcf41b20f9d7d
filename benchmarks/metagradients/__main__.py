"""Time and memory of metagradients: ratios in one run. Run it alone, as ``OMP_NUM_THREADS=1 python -m benchmarks.metagradients``.

python -m benchmarks.metagradients           # all tables
python -m benchmarks.metagradients torch     # one of: torch, maml, jax, long, trust
"""
