"""The parts of scripts/gpu_check, and the page they make."""
