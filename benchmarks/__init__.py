"""Benchmarks of time and memory against baselines and ceilings: see docs/performance.md."""
