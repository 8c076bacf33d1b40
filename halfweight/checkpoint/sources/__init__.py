"""What a conversion reads. One file for each form of checkpoint behind one protocol, `Source`.

`open_source` is the only place where a path becomes a source; who converts passes it on.
"""
