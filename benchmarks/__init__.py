"""Benchmarks, and the demo: fastload beside the ways in which models are loaded without it.

python -m benchmarks.demo     one model, both ways, side by side
python -m benchmarks --help   all cases, all rivals
"""
