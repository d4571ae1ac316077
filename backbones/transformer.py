"""A transformer over the last steps of the episode."""
