"""Run a script in a fresh child process and SIGKILL it just before its N-th change of a file below
a folder: an opening for writing, a renaming, a deletion. Children are forked from a server that has
imported torch already, which saves most of the time that 80 kills take.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["model", "train", "generate_data", "soundfile", "gguf", "espeakng_loader"]
)


def child(command, folder, deadline, said):
    """What runs in the child. deadline 0: no kill, but the number of changes as the last line of
    the file `said`.
    """
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    changes = 0

    def watch(event, arguments):
        nonlocal changes
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        below = isinstance(arguments[0], (str, os.PathLike)) and os.path.abspath(
            arguments[0]
        ).startswith(folder)
        if (
            below or event in ("os.remove", "os.rmdir") and arguments[1] != -1
        ):  # rmtree goes by folder handles
            changes += 1
            if changes == deadline:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    os.chdir(ROOT)
    sys.argv = [str(part) for part in command]
    sys.path[:0] = [str(ROOT), str((ROOT / command[0]).parent)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(f"{changes} changes", flush=True)


def run(command, folder, said, change=0, after=None):
    """-> the exit code: 0, or -9 where the kill came before the change, or after so many seconds."""
    process = server.Process(
        target=child, args=(list(map(str, command)), str(folder), change, str(said))
    )
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), Path(said).read_text()
    return process.exitcode
