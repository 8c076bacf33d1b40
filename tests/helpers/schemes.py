"""Every scheme that there is."""

from halfweight.quantization.scheme import SCALE_FORMATS, Scheme


def all_schemes():
    schemes = []
    for size in (32, 64, 128, 256, "row", "tensor"):
        for scale_format in SCALE_FORMATS:
            if size == "tensor" and scale_format == "grid8":
                continue
            for choice in ("absmax", "least_squares"):
                schemes.append(Scheme(size, scale_format, choice))
    return schemes
