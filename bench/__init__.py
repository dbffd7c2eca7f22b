"""Measurements of Satherd; `python -m bench.run` makes them all. docs/performance.md quotes them."""
