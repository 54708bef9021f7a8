"""What ``python -m pypkg.convert`` does: weights from folder to folder, and a look at them."""
