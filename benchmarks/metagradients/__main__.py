"""Time, memory and trust of metagradients: ratios in one run.

python -m benchmarks.metagradients           # all tables
python -m benchmarks.metagradients torch     # one of: torch, maml, jax, long, trust
"""
