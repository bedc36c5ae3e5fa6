"""Who starts the ranks: threads of this process, or processes on this host."""
