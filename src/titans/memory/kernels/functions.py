"""What both kernels are made of: addresses, products, the activation and the loss's signal, as in ``network.py``."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def product(a, b):
    """a b, summed in float32; float32 operands are not cut to TF32."""
    if INTERPRETED:  # it multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to ``dtype``, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # it cuts off what does not fit
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def token_rows(memory, chunk, chunks, H, C: tl.constexpr, D: tl.constexpr):
    """Where a chunk's rows lie in [B, T, H, D], memory = b H + h: offsets [C, D]."""
    first = (memory // H * chunks * C + chunk * C) * H + memory % H
    return (first + tl.arange(0, C)[:, None] * H) * D + tl.arange(0, D)[None, :]


@triton.jit
def tile(rows: tl.constexpr, columns: tl.constexpr, width):
    """Offsets [rows, columns] in a matrix of that width."""
    return tl.arange(0, rows)[:, None] * width + tl.arange(0, columns)[None, :]


@triton.jit
def columns(pointer, C: tl.constexpr):
    """The two columns of a [C, 2], each as [C, 1]."""
    at = pointer + 2 * tl.arange(0, C)[:, None]
    return tl.load(at), tl.load(at + 1)


@triton.jit
def store_columns(pointer, first, second, C: tl.constexpr):
    """The inverse of ``columns``, from two [C]."""
    at = pointer + 2 * tl.arange(0, C)
    tl.store(at, first)
    tl.store(at + 1, second)


@triton.jit
def mean(x):
    """Of every row, [C, 1]."""
    return (tl.sum(x, 1) / x.shape[1])[:, None]


@triton.jit
def value(z, ACT: tl.constexpr):
    """f(z)"""
    if ACT == "gelu":
        return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        return z * tl.sigmoid(z)
    else:
        return tl.maximum(z, 0.0)


@triton.jit
def slope(z, ACT: tl.constexpr):
    """f'(z)"""
    if ACT == "gelu":
        return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    else:
        return tl.where(z > 0, 1.0, 0.0)


@triton.jit
def curvature(z, ACT: tl.constexpr):
    """f''(z)"""
    if ACT == "gelu":
        return tl.exp(-0.5 * z * z) * (2 - z * z) * 0.3989422804014327
    elif ACT == "silu":
        s = tl.sigmoid(z)
        return s * (1 - s) * (2 + z * (1 - 2 * s))
    else:
        return tl.zeros_like(z)


@triton.jit
def norm_backward(grad, unit, rstd):
    return rstd * (grad - mean(grad) - unit * mean(grad * unit))


@triton.jit
def signal(z, offset, gain, eps, NORM: tl.constexpr):
    """Gradient of the loss at the last map's output z [C, D]; and unit, rstd, error for its own backward."""
    unit, rstd = z, 1.0
    if NORM:
        centred = z - mean(z)
        rstd = 1 / tl.sqrt(mean(centred * centred) + eps)
        unit = centred * rstd
        error = offset + unit * gain
        return norm_backward(2 * gain * error, unit, rstd), unit, rstd, error
    else:
        error = offset + z
        return 2 * error, unit, rstd, error


@triton.jit
def signal_backward(gd, d, gain, unit, rstd, error, NORM: tl.constexpr):
    """Gradients of z and offset [C, D], and of gain [D], from that of the signal d."""
    if NORM:
        grad, ggrad = 2 * gain * error, norm_backward(gd, unit, rstd)
        gerror = 2 * gain * ggrad
        gunit = gain * gerror - rstd * (mean(grad * unit) * gd + mean(gd * unit) * grad)
        gz = norm_backward(gunit, unit, rstd) - unit * rstd * mean(gd * d)
        return gz, gerror, tl.sum(gerror * unit + 2 * error * ggrad, 0)
    else:
        return 2 * gd, 2 * gd, tl.sum(gd * 0, 0)
