"""Speed and memory against Stable-Baselines3: `python -m tests.bench [NAME ...] [--json FILE] [--quick]`."""
