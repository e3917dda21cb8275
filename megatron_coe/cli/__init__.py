"""Command lines: one module per command of `coe`; `main` dispatches."""
