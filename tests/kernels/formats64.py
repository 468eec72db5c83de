"""What 8 bits may cost, in NumPy's f64 and from the formats' own definitions: nothing here is the code's."""

import ml_dtypes
import numpy as np

TYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "int8": np.int8}
# Largest number, half a distance between neighbours over the number, distance next to zero.
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0}
RELATIVE = {"e4m3": 2.0**-4, "e5m2": 2.0**-3, "int8": 0.0}
STEP = {"e4m3": 2.0**-9, "e5m2": 2.0**-16, "int8": 1.0}
# f32's rounding of a quotient, a product and a scale; its denormals count as zero.
ROUNDING, TINY = 2.0**-22, 2.0**-126


def numbers(name):
    """Every finite number of a format, but int8's -128."""
    every = np.arange(256, dtype=np.uint8).view(TYPES[name]).astype(np.float64)
    return np.unique(every[np.isfinite(every) & (np.abs(every) <= LARGEST[name])])


def maxima(x, block):
    """The largest |x| of each number's block."""
    x = np.abs(np.asarray(x, np.float64))
    rows, columns = x.shape if block is None else block
    out = np.empty_like(x)
    for i in range(0, x.shape[0], max(rows, 1)):
        for j in range(0, x.shape[1], max(columns, 1)):
            part = slice(i, i + rows), slice(j, j + columns)
            out[part] = x[part].max()
    return out


def smallest(x, name, block):
    """Half a step next to zero, in each number's block: a float's scale is at most twice the least that will do. Zero
    stays zero."""
    scale = maxima(x, block) / LARGEST[name] * (1 if name == "int8" else 2)
    return np.where(np.asarray(x) == 0, 0, np.maximum(scale, TINY) * STEP[name] / 2 + TINY)


def error(x, name, block):
    """The most that rounding to the format may change each number."""
    x = np.abs(np.asarray(x, np.float64))
    return np.maximum(RELATIVE[name] * x, smallest(x, name, block)) * (1 + ROUNDING) + ROUNDING * x


def product_error(x, x_error, w, w_error, rounding=0.0):
    """The most that the product of two matrices changes with them, added up in f32 and rounded at last."""
    x, w = np.abs(np.asarray(x, np.float64)), np.abs(np.asarray(w, np.float64))
    changed = x @ w_error + x_error @ w + x_error @ w_error
    total = (x + x_error) @ (w + w_error)
    return changed + total * ((x.shape[1] + 8) * 2.0**-24 + rounding) + TINY


def assert_within(got, want, bound, what):
    """Element by element; a failure prints the largest error and how far beyond its bound it is."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    difference = np.abs(got - want)
    beyond = ~(difference <= bound)
    if beyond.any():
        worst = np.unravel_index(
            np.argmax(np.where(beyond, np.nan_to_num(difference - bound, nan=np.inf), -1)), got.shape
        )
        raise AssertionError(
            f"{what}: largest error {np.nanmax(difference):.3e}, mean {np.nanmean(difference):.3e}; {beyond.sum()} of "
            f"{beyond.size} beyond their bounds, worst at {worst}: {got[worst]}, expected {want[worst]}, "
            f"bound {bound[worst]:.3e}"
        )
