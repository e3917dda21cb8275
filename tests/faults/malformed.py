"""Malformed settings, command lines and data files: each must be answered in one message.

    python -m tests.faults.malformed [-O] [part of a name …]

The message stands on stderr, names the field or file, its value and the fix; the status is not
zero; no process group has been created and nothing half written is left.
"""

from __future__ import annotations

from tests.faults import malformed_data, malformed_runs, malformed_settings, malformed_tools
from tests.faults.commands import Case, main


def cases() -> list[Case]:
    kinds = (malformed_settings, malformed_data, malformed_tools, malformed_runs)
    return [case for kind in kinds for case in kind.cases()]


if __name__ == "__main__":
    main("tests.faults.malformed")
