"""What the model costs in time and memory, beside what it could cost: see docs/performance.md."""
