"""Stopping a run between two updates when the system or the user asks."""

import signal


class StopRequest:
    """While entered, SIGTERM and SIGINT set `requested`; a second one acts as it did before."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._request) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number, frame) -> None:
        self.requested = True
        signal.signal(number, self._before[number])
