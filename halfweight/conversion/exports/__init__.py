"""The forms that INT8 weights are exported to, one file each.

In: an Int8Folder. Out: a `Form`: every byte of the output planned, what is rounded known, what
cannot be refused by name, nothing written yet. First file: form.py.
"""
