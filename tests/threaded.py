"""A function in a thread, whose result or exception is that of the test."""

import threading


def in_thread(function):
    """Runs a function in a thread; returns a function that waits for its result or raises what it raised."""
    found = []

    def run():
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()

    def result():
        thread.join(10)
        ((value, error),) = found
        if error is not None:
            raise error
        return value

    return result
