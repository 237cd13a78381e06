"""300 processes send a hello at the same time: `storm.py SOCKET HELLO ANSWER_BYTES SECONDS`, HELLO in hexadecimal.

Each process waits for its answer for at most SECONDS, as a shim does.

The program prints `started` when they begin, then a line of JSON. This line has, for each process, the seconds until it
was answered (-1: it was not), the number of its attempts, and the number of attempts in which it had no processor to
send. The program is separate, because otherwise copies of the test runner, with all of its memory, would be measured
instead of the gatekeeper.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time

STORM = 300
SILENCE_SECONDS = 0.15  # the gatekeeper may close a connection that is silent for a little longer
RESULT = struct.Struct("dII")


def attempt(path: str, hello: bytes, answer_bytes: int, end: float) -> tuple[bool, float]:
    """Make one attempt as a shim does, with a time limit for the answer only.

    Return also how long it could not send.
    """
    began = time.monotonic()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(path)
            sock.send(hello)
            kept = time.monotonic() - began
            sock.settimeout(max(0.001, end - time.monotonic()))
            return len(socket.recv_fds(sock, 512, 16)[0]) == answer_bytes, kept
        except OSError:
            return False, time.monotonic() - began


def say_hello(path: str, hello: bytes, answer_bytes: int, patience: float) -> tuple[float, int, int]:
    """Send hellos as a shim does, until one is answered or the shim's time limit has passed."""
    began, attempts, mute = time.monotonic(), 0, 0
    while True:
        answered, kept = attempt(path, hello, answer_bytes, began + patience)
        attempts += 1
        mute += kept > SILENCE_SECONDS
        if answered or time.monotonic() - began > patience:
            return time.monotonic() - began if answered else -1.0, attempts, mute
        time.sleep(0.01)


def main(path: str, hello: bytes, answer_bytes: int, patience: float) -> None:
    """Keep all processes alive until each has been answered or has given up."""
    gate, results, stay = os.pipe(), os.pipe(), os.pipe()
    for _ in range(STORM):
        if os.fork() == 0:
            os.close(gate[1])
            os.close(stay[1])
            os.read(gate[0], 1)
            os.write(results[1], RESULT.pack(*say_hello(path, hello, answer_bytes, patience)))
            os.read(stay[0], 1)
            os._exit(0)
    time.sleep(0.1)  # by then all of them wait
    os.close(gate[1])
    print("started", flush=True)
    met = [RESULT.unpack(os.read(results[0], RESULT.size)) for _ in range(STORM)]
    os.close(stay[1])
    for _ in range(STORM):
        os.wait()
    print(json.dumps(met), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
