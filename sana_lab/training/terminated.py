"""The end of a training by SIGTERM."""

import signal


class Terminated(KeyboardInterrupt):
    """SIGTERM has ended the process; what was trained is in a checkpoint, for the command to be run again."""

    status = 128 + signal.SIGTERM  # exit status, as of a process that the signal ends
