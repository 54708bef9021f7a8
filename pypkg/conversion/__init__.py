"""What ``python -m pypkg.convert`` does: weights from folder to folder, and a look at them.

File formats and weight maps belong to ``pypkg.models``. A destination appears under its name only
when it is complete.
"""
