"""A worker process of worker_pool.py: receives a callable, then calls it on one item after another.

It lives no longer than its parent: a thread waits for the parent's end of the socket to close, which the kernel sees to
whatever the parent died of. A call that holds the interpreter's lock would keep that thread from running, so each call is
also watched by a timer in C, far behind the deadline that the parent itself holds it to.
"""

import contextlib
import faulthandler
import importlib
import os
import pickle
import select
import socket
import threading
import traceback
from collections.abc import Sequence

import torch

from synpo_fast.data.workers.messages import receive_message, send_message

READY, DONE, RAISED = "ready", "done", "raised"


def main(descriptor: int, deadline_s: float, preload: Sequence[str] = ()) -> None:
    connection = socket.socket(fileno=descriptor)
    threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
    for module in preload:
        with contextlib.suppress(ImportError):  # the callable will want it, and say so
            importlib.import_module(module)
    try:
        _serve(connection, deadline_s)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone, or wants no more


def _serve(connection: socket.socket, deadline_s: float) -> None:
    torch.set_num_threads(1)
    pickled_work = receive_message(connection)
    try:
        work = pickle.loads(pickled_work)  # from the process that started this one, over its own socket pair
    except Exception:  # whatever an import in there may raise, the parent should show it
        send_message(connection, (RAISED, traceback.format_exc()))
        return
    send_message(connection, (READY, None))
    while True:
        item = receive_message(connection)
        faulthandler.dump_traceback_later(2 * deadline_s + 5, exit=True)
        try:
            send_message(connection, (DONE, work(item)))
        except (BrokenPipeError, ConnectionResetError):
            raise
        except Exception:  # it is raised again in the parent
            send_message(connection, (RAISED, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
        del item  # or it would stay in memory until the next one is there


def _end_with_parent(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # hang-up is always reported
    poll.poll()
    os._exit(0)
