"""A peer program in its own environment, taking one training step at a time: the other side of compare_training.py.

    python peer.py transformers | trl | llamafactory | axolotl | xtuner | torchtune

It speaks as `minituner/plan/bench_train_worker.py` does: a line of JSON says what to train on, then each line `step` is
one optimizer step and one line of JSON. Nothing of minituner is imported, as a peer's environment has none of it. Each
peer trains its own way with its own loop, packing and attention; it is stopped between two steps of that loop.

    peer_environments.py   what is installed for each
    peer_steps.py          the words between the two processes, the counting, the look at isolation
    peer_trainers.py       the peers that use transformers' Trainer
    peer_loops.py          the peers with a loop of their own

Lesson: notebook 07.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

from peer_loops import run_torchtune, run_xtuner
from peer_steps import Steps
from peer_trainers import run_axolotl, run_llamafactory, run_transformers, run_trl

PEERS = {
    "transformers": run_transformers,
    "trl": run_trl,
    "llamafactory": run_llamafactory,
    "axolotl": run_axolotl,
    "xtuner": run_xtuner,
    "torchtune": run_torchtune,
}


def main() -> None:
    """Run the peer that the command line names on what standard input says."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print, from C too; answers have a stream of their own
    sys.stdout = sys.stderr
    spec = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory(prefix="peer-") as folder:
        PEERS[sys.argv[1]](spec, Steps(answers, folder), folder)


if __name__ == "__main__":
    main()
