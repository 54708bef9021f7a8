"""``python -m pypkg.convert``: converts folders of weights, and lists their tensors.

File formats and weight maps are in ``pypkg.models``. A destination appears under its name only when
it is complete.
"""
