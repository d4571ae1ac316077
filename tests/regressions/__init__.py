"""Pinned traces of short seeded runs; `python -m tests.regressions` rewrites them."""
