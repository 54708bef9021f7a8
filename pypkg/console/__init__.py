"""Shared by all commands: log lines, progress, tables, errors, exit codes, completion.

Any module may import this package, except ``completion.py``, which gets the options from the
commands. The commands themselves are modules of ``pypkg``. Text that only one command prints is in
the module of that command.
"""
