def run(options): return ""
