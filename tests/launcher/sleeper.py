"""Stands in for a coordinator: has a child, takes note of SIGTERM and goes on."""

import signal
import subprocess
import sys
import time

signal.signal(signal.SIGTERM, lambda *_: print("asked to stop", flush=True))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready", flush=True)
end = time.monotonic() + 600
while time.monotonic() < end:
    time.sleep(0.05)
