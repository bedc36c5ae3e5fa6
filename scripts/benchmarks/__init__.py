"""What scripts/bench measures, one section per file, on top of rounds, hosts and statistics of their own."""
