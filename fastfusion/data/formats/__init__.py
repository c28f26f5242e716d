"""One module a file format, each with the same two functions.

``load(path, variable, bands_axis) -> Stored`` finds the cube in a file, without copying it into
memory where the format allows that, and ``save(path, cube)`` writes one. They may raise anything
their libraries raise: `fastfusion.data.files` turns it into one clear error.
"""
