"""The code of a worker process (worker_pool.py): receives a callable, then calls it on one item after another.

A worker ends when its parent ends: a thread waits until the parent's end of the socket closes. The kernel closes it however the
parent died. A call that holds the GIL would block that thread, so a timer in C limits each call as well. Its limit is far above
the deadline that the parent enforces.
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
        with contextlib.suppress(ImportError):  # unpickling the callable imports it again and reports the error
            importlib.import_module(module)
    try:
        _serve(connection, deadline_s)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has ended or closed the connection


def _serve(connection: socket.socket, deadline_s: float) -> None:
    torch.set_num_threads(1)
    pickled_work = receive_message(connection)
    try:
        work = pickle.loads(pickled_work)  # from the process that started this one, over its own socket pair
    except Exception:  # an import in there may raise anything; the parent reports it
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
        del item  # otherwise it stays in memory until the next one arrives


def _end_with_parent(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is always reported
    poll.poll()
    os._exit(0)
