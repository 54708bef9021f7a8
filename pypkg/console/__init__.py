"""What commands have in common: log lines, progress, tables, errors, exit codes, completion.

Leaves that any module may import, except ``completion.py``, which asks the commands for their
options. The commands themselves are modules of ``pypkg``. Text that one command alone prints stays
with that command.
"""
