"""Benchmarks on long audio: scoring, baselines, statistics, plots and the report."""
