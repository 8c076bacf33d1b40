"""All knowledge of the disk: headers, shards, index, sources, the layout of what we write.

In: a path, or a Hub id. Out: a Checkpoint whose every byte is known to lie where its headers say,
a Source to convert, or a Layout to write. No weight is read here but on request, and no model is
built. First file: headers.py (what is there), then sources/ (what a conversion reads) and layout.py
(what it writes).

May import: errors, quantization.
"""
