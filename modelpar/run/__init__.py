"""Does what a plan says: processes or threads, messages, autograd."""
