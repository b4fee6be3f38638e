"""What a local Ray starts each worker with, in place of its own setup_worker.py.

That imports Ray, for longer than the rest of a worker's start takes, to learn by which Python to go on. Ours
hands the worker to the server of `lungseg.warm` at once, and leaves to Ray's what it does not know.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from lungseg.warm import executable, start

ARGUMENT = "-mlungseg.worker_setup"
"""Of Python, where Ray would have the path of its own."""
_CONTEXT, _LANGUAGE = "--serialized-runtime-env-context", "--language"


def main(arguments: list[str]) -> NoReturn:
    options = dict(one.split("=", 1) for one in arguments if one.startswith((_CONTEXT, _LANGUAGE)))
    worker = [one for one in arguments if not one.startswith((_CONTEXT, _LANGUAGE))]
    if _CONTEXT not in options:  # Ray would start it without any setup
        os.execv(sys.executable, [sys.executable, *worker])
    context = json.loads(options[_CONTEXT])
    variables, words = context.pop("env_vars", {}), shlex.split(context.pop("py_executable", ""))
    ours = len(words) > 1 and shlex.join(words) == executable(words[-1])
    if ours and not any(context.values()) and not any("$" in value for value in variables.values()):
        os.environ.update(variables)
        start(words[-1], worker)
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    theirs = Path(ray.origin or "").parent / "_private" / "workers" / "setup_worker.py"
    os.execv(sys.executable, [sys.executable, str(theirs), *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
