"""How much memory this process has held; apart, as it must cost none itself."""

import resource
import sys


def peak_bytes() -> int:
    """The most memory that this process has held so far, in bytes.

    Linux also has `ru_maxrss`, but a new process takes over its parent's figure.
    """
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
