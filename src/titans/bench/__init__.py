"""Speed and memory, side by side: every subject in its own process, all of them in turn, ratios in one run."""
