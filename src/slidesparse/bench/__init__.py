"""Benchmarks as a package: one schema of rows, what is measured, advice from what was measured, tables, pictures and a report."""
