"""A process whose loop hangs ends for its restart, with its stacks; not before it hangs."""

import signal
import subprocess
import sys

from interns1pro_jax.train.watchdog import INTERRUPTED

HANGS = """
import sys, threading, time
from pathlib import Path
from interns1pro_jax.train.watchdog import Watchdog

def stuck():
    threading.Event().wait()

with Watchdog(1.0, Path(sys.argv[1]), 7) as watchdog:
    time.sleep(1.2)  # nothing is watched before the first beat
    watchdog.beat("step 0")
    time.sleep(0.3)
    watchdog.pause()
    time.sleep(2.2)  # nor in a pause
    for step in range(1, 4):
        watchdog.beat(f"step {step}")
        time.sleep(0.3)
    stuck()
"""


def test_a_hang_ends_the_process_for_a_restart_and_leaves_its_stacks(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANGS, tmp_path / "dumps"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == INTERRUPTED
    for text in (done.stderr, (tmp_path / "dumps" / "hang_process_7.txt").read_text()):
        assert "process 7 hangs in step 3" in text and "hang_seconds" in text and "in stuck" in text and "start again" in text


STUCK = """
import ctypes, sys, time
from pathlib import Path
from interns1pro_jax.train.watchdog import Watchdog

def holds_the_interpreter():
    ctypes.PyDLL(None).sleep(50)

with Watchdog(0.5, Path(sys.argv[1])) as watchdog:
    watchdog.beat("step 0")
    time.sleep(0.3)
    holds_the_interpreter()
"""


def test_a_hang_of_the_interpreter_ends_the_process_by_a_signal(tmp_path):
    done = subprocess.run([sys.executable, "-c", STUCK, tmp_path], capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == -signal.SIGALRM and "in holds_the_interpreter" in done.stderr
