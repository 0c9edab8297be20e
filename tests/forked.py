"""Children of the test process that never return into it."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

MAX_SECONDS = 120


def fork(function: Callable[[], object]) -> int:
    """Run ``function`` in a forked child; return its process id.

    The child exits with 0 where ``function`` returns a true value, 1 where it does not, 70 where it raises. An
    exception must not leave it: the child would run the remaining tests, too, and report them as this worker. A child
    that hangs is ended by SIGALRM.
    """
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(MAX_SECONDS)
        code = 0 if function() else 1
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def exit_code(child: int) -> int:
    """Wait for a child; return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
