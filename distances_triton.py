"""
CUDA kernels for the elementwise cores of distances.py: they compute s for all pairs and its gradients, and hold
nothing of size N x V x D.

    s = forward(kernel, h, w)                  # h (N, D), w (V, D) -> (N, V), all fp32
    backward(kernel, h, w, s, g, dh, dw)       # adds g ds/dh to dh (N, D) and g ds/dw to dw (V, D); s, g (N, V)

    kernel                         s, with x = h - w    slope of s in |x|; exactly 0 at x = 0, but that of l1 is -1
    ("l1",)                        sum |x|              1
    ("l1", "half")                 the same             the same, in fp16, two coordinates an instruction: see below
    ("linf",)                      max |x|              1 / number of ties where |x| = s, else 0
    ("lp", p), 1 < p <= 4          (sum |x|^p)^(1/p)    (|x| / s)^(p-1); 1.5 and 3 have kernels without powers
    ("canberra", eps, min_denom)   sum |x| / q          its derivative, where a q at its floor does not move

    q = max(|h| + |w| + eps, min_denom). An eps of 0 is taken for 1e-30, so that 0 / 0 counts as 0.

    python distances_triton.py                 # counts the instructions per element, compiled for sm_90; needs no GPU

How it is built. A tile of the result stays in registers while one coordinate (forward) or one row (backward) after
the other passes by: `acc += f(column, row)`. A product of matrices does no more, except that here f takes 2 to 14
instructions on no tensor core. So the number of instructions per element is the cost, and everything else is done
outside of the loop:
    h and w are rescaled by a power of two, which is exact, so that powers of differences stay in range.
    What depends on (n, v) alone, such as g s^(1-p), is multiplied into g beforehand.
    A tile that begins as a load keeps the shape of a load in the registers: each thread has some 16 rows of 4 columns,
    and reads 20 numbers for 64 elements. A tile that begins as zeros has one column to a thread, which reads 65.
    One kernel makes dh and, with h and w exchanged, dw: for every core here the slope in w is that in h, exchanged.

("l1", "half") rounds h, w and g to fp16, that is by up to 2^-11 of themselves; g after each of its rows, for dh, or
columns, for dw, is scaled to at most 1. It sums 8 terms in fp16 before it adds them up in fp32. That takes 0.6 of the
instructions. Distances of 768 dimensions err by 5e-5 (root mean square), half of what rounding h and w to bf16 does;
the gradient is that of the rounded coordinates. No head takes it by itself: head.core.kernel = ("l1", "half") does.

The other kernels stay in fp32. A maximum that is rounded has ties, which its gradient would share; powers and
reciprocals have no packed instruction.

TRITON_INTERPRET=1 in the environment runs all of it on CPU tensors, slowly.
"""
import math
import re
import sys
import warnings

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import libdevice
except ImportError:
    if __name__ == "__main__":
        raise SystemExit("distances_triton.py needs triton, which is for Linux: pip install triton") from None
    raise

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
STEPS = tl.constexpr(8) # terms of a partial sum: of 8 differences, fp16 keeps three digits


@triton.jit
def _log2(x):
    """
    Return log2(x), good to 2^-22, by the hardware's own instruction. tl.log2, which the interpreter needs, is a
    polynomial of some 25 instructions.
    """
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def _forward(hT, wT, s, known, top, N, V, D, HS, WS, p, eps, floor,
             KIND: tl.constexpr, FLOOR: tl.constexpr, TN: tl.constexpr, TV: tl.constexpr):
    """
    Store s (N, V) of hT (D+1, HS) and wT (D+1, WS), which are padded to whole tiles. KIND "ties" counts the coordinates
    with |x| = known (N, V) instead.
    """
    n = tl.program_id(0) * TN + tl.arange(0, TN)
    v = tl.program_id(1) * TV + tl.arange(0, TV)
    tile, mask = n.to(tl.int64)[:, None] * V + v[None, :], (n < N)[:, None] & (v < V)[None, :]
    hT += n
    wT += v
    acc = tl.load(s + tile, mask & (n < 0)[:, None], 0.0) # of nothing: see the note on a tile's registers
    if KIND == "ties":
        s_known = tl.load(known + tile, mask, 0.0)
    h_next, w_next = tl.load(hT), tl.load(wT)
    for _ in range(D):
        h, w = h_next.to(tl.float32)[:, None], w_next.to(tl.float32)[None, :]
        hT += HS
        wT += WS
        h_next, w_next = tl.load(hT), tl.load(wT) # on their way during the arithmetic; row D is padding
        x = tl.abs(h - w)
        if KIND == "l1":
            acc += x
        elif KIND == "linf":
            acc = tl.maximum(acc, x)
        elif KIND == "ties":
            acc = tl.where(x == s_known, acc + 1.0, acc)
        elif KIND == "l1.5":
            acc += x * tl.sqrt(x)
        elif KIND == "l3":
            acc += x * x * x
        elif KIND == "lp":
            acc += tl.exp2(p * _log2(x)) # 0 at 0: 2^(p log 0) = 2^-inf
        else:
            q = tl.abs(h) + tl.abs(w) + eps
            if FLOOR:
                q = tl.maximum(q, floor)
            r = tl.rsqrt(q)
            acc += x * (r * r) # a division would take more instructions
    if KIND == "l1.5" or KIND == "l3" or KIND == "lp":
        acc = tl.where(acc > 1e-36, tl.exp2(_log2(acc) / p), 0.0) * tl.load(top)
    tl.store(s + tile, acc, mask)


@triton.jit
def _backward(a, b, c, s, out, scale, A, B, D, rows, p, eps, floor,
              KIND: tl.constexpr, FLOOR: tl.constexpr, TA: tl.constexpr, TD: tl.constexpr):
    """
    Add sum_j c[j, i] slope(a[i], b[j]) to out[:, i], for a (A, D), b (B, D), c and s (B, A), out (parts, A, D). Each
    part sums over rows j of its own, `rows` of them.
    """
    d = tl.program_id(0) * TD + tl.arange(0, TD)
    i = tl.program_id(1) * TA + tl.arange(0, TA)
    part = tl.program_id(2)
    tile, mask = i.to(tl.int64)[:, None] * D + d[None, :], (i < A)[:, None] & (d < D)[None, :]
    r = tl.load(scale)
    x = tl.load(a + tile, mask, 0.0).to(tl.float32) * r
    sign = tl.clamp(x * 2.0 ** 126, -1.0, 1.0)
    acc = tl.full((TA, TD), 0.0, tl.float32)
    first = (part * rows).to(tl.int64)
    last = min(first + rows, B)
    b += first * D + d
    c += first * A + i
    s += first * A + i
    b_next, c_next = tl.load(b, d < D), tl.load(c, i < A)
    if KIND == "linf":
        s_next = tl.load(s, i < A)
    for j in range(first, last):
        y, g = b_next.to(tl.float32)[None, :] * r, c_next[:, None]
        D_next, A_next = tl.where(j + 1 < last, D, 0), tl.where(j + 1 < last, A, 0)
        b += D
        c += A
        b_next, c_next = tl.load(b, d < D_next), tl.load(c, i < A_next)
        z = x - y
        if KIND == "linf":
            acc = tl.where(tl.abs(z) == s_next[:, None], acc + g * z, acc)
            s += A
            s_next = tl.load(s, i < A_next)
        elif KIND == "l1.5":
            acc += g * (z * tl.rsqrt(tl.abs(z) + 1e-37))
        elif KIND == "l3":
            acc += g * (z * tl.abs(z))
        elif KIND == "lp":
            acc += g * (z * tl.exp2((p - 2) * _log2(tl.abs(z) + 1e-37)))
        else:
            # the slope is sign(z) (2|y| + eps) / q^2 where x and y have the same sign, sign(z) eps / q^2 where they
            # have not, and sign(z) / floor at the floor
            k = tl.abs(y) + eps
            q = tl.abs(x) + k
            k += sign * y
            if FLOOR:
                k = tl.where(q > floor, k, floor)
                q = tl.maximum(q, floor)
            u = tl.rsqrt(q)
            u *= u
            k = k * u * u
            acc += g * tl.clamp(z * 2.0 ** 126, -k, k)
    out += part.to(tl.int64) * A * D
    tl.store(out + tile, tl.load(out + tile, mask, 0.0) + acc, mask)


@triton.jit
def _forward_half(hT, wT, s, scale, N, V, D, HS, WS, TN: tl.constexpr, TV: tl.constexpr):
    """Store scale sum |h - w| (N, V) of fp16 hT (rows, HS) and wT (rows, WS); D is a multiple of STEPS."""
    n = tl.program_id(0) * TN + tl.arange(0, TN)
    v = tl.program_id(1) * TV + tl.arange(0, TV)
    tile, mask = n.to(tl.int64)[:, None] * V + v[None, :], (n < N)[:, None] & (v < V)[None, :]
    hT += n
    wT += v
    acc = tl.load(s + tile, mask & (n < 0)[:, None], 0.0)
    h_next, w_next = tl.load(hT), tl.load(wT)
    for _ in range(0, D, STEPS):
        part = tl.zeros((TN, TV), tl.float16)
        for _ in tl.static_range(STEPS):
            h, w = h_next[:, None], w_next[None, :]
            hT += HS
            wT += WS
            h_next, w_next = tl.load(hT), tl.load(wT) # row D is padding
            part += tl.abs(h - w)
        acc += part.to(tl.float32)
    tl.store(s + tile, acc * tl.load(scale), mask)


@triton.jit
def _add_where_above(acc, x, y, g, AT_0: tl.constexpr):
    """
    Return acc + g where x > y, else acc; with AT_0 where x >= y. On a GPU fp16 takes two instructions for two elements,
    which no compiler finds.
    """
    if x.dtype == tl.float16 and not INTERPRETED:
        x, y = tl.broadcast(x, y)
        g, acc = tl.broadcast(tl.broadcast(g, x)[0], acc)
        if AT_0:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 z; set.ge.f16x2.f16x2 z, $1, $2; fma.rn.f16x2 $0, $3, z, $4; }", "=r,r,r,r,r",
                [x, y, g, acc], tl.float16, True, 2)
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 z; set.gt.f16x2.f16x2 z, $1, $2; fma.rn.f16x2 $0, $3, z, $4; }", "=r,r,r,r,r",
                [x, y, g, acc], tl.float16, True, 2)
    elif AT_0:
        return tl.where(x >= y, acc + g, acc)
    else:
        return tl.where(x > y, acc + g, acc)


@triton.jit
def _backward_l1(a, b, c, minus, out, A, B, D, rows, BS, CS, AT_0: tl.constexpr, TA: tl.constexpr, TD: tl.constexpr):
    """
    Add sum_j c[j, i] / 2 sign(a[i] - b[j]) to out[:, i], for a (A, D), b (B, BS) and c (B, CS), out (parts, A, D). Each
    part sums over `rows` rows j of its own, a multiple of STEPS; b and c are padded with zeros.

    A sign is 2 [a > b] - 1, so that one comparison is enough: minus (B / STEPS, CS) is -1/2 of the sums of STEPS rows
    of c. Every partial sum begins with it, as the difference of two large sums would lose digits.
    """
    d = tl.program_id(0) * TD + tl.arange(0, TD)
    i = tl.program_id(1) * TA + tl.arange(0, TA)
    part = tl.program_id(2)
    tile, mask = i.to(tl.int64)[:, None] * D + d[None, :], (i < A)[:, None] & (d < D)[None, :]
    x = tl.load(a + tile, mask, 0.0)
    acc = tl.load(out + part.to(tl.int64) * A * D + tile, mask, 0.0)
    first = (part * rows).to(tl.int64)
    b += first * BS + d
    c += first * CS + i
    minus += first // STEPS * CS + i
    b_next, c_next = tl.load(b), tl.load(c)
    for _ in range(0, rows, STEPS):
        sums, _ = tl.broadcast(tl.load(minus)[:, None], x)
        minus += CS
        for _ in tl.static_range(STEPS):
            y, g = b_next[None, :], c_next[:, None]
            b += BS
            c += CS
            b_next, c_next = tl.load(b), tl.load(c) # the row after the last one is padding
            sums = _add_where_above(sums, x, y, g, AT_0)
        acc += sums.to(tl.float32)
    out += part.to(tl.int64) * A * D
    tl.store(out + tile, acc, mask)


# -----------------------------------------------------------------------------
# the functions that distances.py calls

def supports(kernel):
    """Return whether there is such a kernel. Beyond p = 4 the sum of powers would leave the range of fp32."""
    if kernel[0] == "lp":
        return 1 < kernel[1] <= 4
    return kernel in (("l1",), ("l1", "half"), ("linf",)) or kernel[0] == "canberra"


def _parse(kernel):
    """Return (KIND, p, eps, floor) of a kernel."""
    name, *numbers = kernel
    if name == "canberra":
        return name, 1.0, max(float(numbers[0]), 1e-30), float(numbers[1])
    if name == "lp":
        p = float(numbers[0])
        return {1.5: "l1.5", 3.0: "l3"}.get(p, "lp"), p, 0.0, 0.0
    return " ".join(kernel), 1.0, 0.0, 0.0


def _tiles(KIND):
    """Return (rows, columns) of a tile of the forward and of the backward pass, as large as 128 threads can hold."""
    return (128, 64), (128, 32) if KIND == "canberra" else (128, 64)


def _scale(h, w, exponent):
    """
    Return the power of two that brings the largest coordinate to just below 2^exponent. It is a scalar on the device,
    so that nothing waits for it.
    """
    top = torch.maximum(torch.linalg.vector_norm(h, math.inf), torch.linalg.vector_norm(w, math.inf))
    power = (exponent - torch.frexp(top).exponent).clamp(-126, 126)
    return ((power + 127) << 23).view(torch.float32) # the bits of 2^power in fp32


def _up_to(n, step):
    """Return n, rounded up to a multiple of step."""
    return triton.cdiv(n, step) * step


def _padded(x, r, rows, columns, dtype):
    """Return r x of that dtype, for x (M, K), with zeros after it: (rows, columns)."""
    out = x.new_zeros(rows, columns, dtype=dtype)
    torch.mul(x, r, out=out[:len(x), :x.shape[1]])
    return out


def _launch_forward(kind, h, w, s, known=None):
    """Fill s (N, V); kind is that of _parse."""
    KIND, p, eps, floor = kind
    (N, D), V, (TN, TV) = h.shape, len(w), _tiles(KIND)[0]
    half, r = KIND == "l1 half", h.new_ones(())
    if half:
        r = _scale(h, w, 11) # of coordinates below 2^11, STEPS differences stay in the range of fp16
    elif p > 1:
        r = _scale(h, w, 0)
    steps, dtype = (STEPS.value, torch.float16) if half else (1, torch.float32)
    hT, wT = (_padded(x.T, r, _up_to(D, steps) + 1, _up_to(len(x), tile), dtype) for x, tile in ((h, TN), (w, TV)))
    grid = triton.cdiv(N, TN), triton.cdiv(V, TV)
    if half:
        _forward_half[grid](hT, wT, s, 1 / r, N, V, _up_to(D, steps), hT.shape[1], wT.shape[1], TN, TV, num_warps=4)
        return
    if known is None:
        known = s # any address: only "ties" reads it
    _forward[grid](hT, wT, s, known, 1 / r, N, V, D, hT.shape[1], wT.shape[1], p, eps, floor,
                   KIND, floor > 0, TN, TV, num_warps=4, enable_fp_fusion=True)


def forward(kernel, h, w, out=None):
    """Return s (N, V) for all pairs of rows of h (N, D) and w (V, D), in out (N, V) if it is given."""
    in_place = out is not None and out.is_contiguous()
    s = out if in_place else h.new_empty(len(h), len(w))
    if s.numel():
        with torch.cuda.device_of(h):
            _launch_forward(_parse(kernel), h, w, s)
    return s if out is None or in_place else out.copy_(s)


def backward(kernel, h, w, s, g, dh, dw):
    """
    Add the gradients of s = forward(kernel, h, w), weighted by g (N, V), to dh (N, D) and dw (V, D). The order of
    every sum is fixed.
    """
    if not g.numel():
        return
    KIND, p, _, _ = kind = _parse(kernel)
    h, w, s = h.contiguous(), w.contiguous(), s.contiguous()
    with torch.cuda.device_of(h):
        if KIND in ("l1", "l1 half"):
            half = KIND == "l1 half"
            _launch_backward_l1(h, w, g.T, dh, half, at_0=False)
            _launch_backward_l1(w, h, g, dw, half, at_0=True) # of the opposite sign where h = w
            return
        r = h.new_ones(()) if KIND == "canberra" else _scale(h, w, 0)
        if KIND != "canberra": # what depends on the pair alone goes into g, in the scale of the kernel
            s_r = s * r
            if KIND == "linf": # 1 / (ties s_r), as z / s_r is sign(x) where |x| = s
                c = torch.empty_like(s)
                _launch_forward(("ties", *kind[1:]), h, w, c, s)
                c.clamp_(min=1).mul_(s_r).reciprocal_()
            else:
                c = s_r.pow(1 - p)
            g, s = c.mul_(g).masked_fill_(s_r < 1e-36 ** (1 / p), 0), s_r
        s_T = s.T.contiguous() if KIND == "linf" else s # no other kernel reads it
        _launch_backward(kind, h, w, g.T.contiguous(), s_T, r, dh)
        _launch_backward(kind, w, h, g.contiguous(), s, r, dw)


def _split(grad, B, tile):
    """
    Return how the sum over B rows for grad (A, D) is cut into parts: (rows of a part, parts, the grid, out). The parts
    go into out (parts, A, D), which is grad itself where one is enough.
    """
    (A, D), (TA, TD) = grad.shape, tile
    across, down = triton.cdiv(D, TD), triton.cdiv(A, TA)
    # a GPU of 132 processors holds some 264 tiles at a time: parts of at least 64 rows give it up to four rounds of
    # them
    most_parts = max(1, min(1056 // (across * down), triton.cdiv(B, 64)))
    rows = _up_to(triton.cdiv(B, most_parts), STEPS.value)
    parts = triton.cdiv(B, rows)
    out = grad if parts == 1 and grad.is_contiguous() else grad.new_zeros(parts, A, D)
    return rows, parts, (across, down, parts), out


def _launch_backward(kind, a, b, c, s, r, grad):
    """Add sum_j c[j, i] slope(a[i], b[j]) to grad[i], for grad (A, D)."""
    KIND, p, eps, floor = kind
    (A, D), B, tile = a.shape, len(b), _tiles(KIND)[1]
    rows, _, grid, out = _split(grad, B, tile)
    _backward[grid](a, b, c, s, out, r, A, B, D, rows, p, eps, floor,
                    KIND, floor > 0, *tile, num_warps=4, enable_fp_fusion=True)
    if out is not grad:
        grad += out.sum(0)


def _launch_backward_l1(a, b, c, grad, half, at_0):
    """Add sum_j c[j, i] sign(a[i] - b[j]) to grad[i], for grad (A, D); sign(0) is 1 with at_0, else -1."""
    (A, D), B, tile = a.shape, len(b), _tiles("l1")[1]
    rows, parts, grid, out = _split(grad, B, tile)
    columns, dtype, r, factor = _up_to(A, tile[0]), a.dtype, 1, 2
    if half:
        dtype, r = torch.float16, _scale(a, b, 11)
        a = (a * r).half()
        top = c.abs().amax(0).clamp_min_(torch.finfo(c.dtype).tiny) # (A,)
        factor = 1 / top
        out = grad.new_zeros(parts, A, D)
    b = _padded(b, r, parts * rows + 1, _up_to(D, tile[1]), dtype)
    c = _padded(c, factor, parts * rows + STEPS.value, columns, dtype)
    minus = c.view(-1, STEPS.value, columns).sum(1, dtype=torch.float32).mul_(-0.5).to(dtype)
    _backward_l1[grid](a, b, c, minus, out, A, B, D, rows, b.shape[1], columns, at_0, *tile, num_warps=4)
    if half:
        grad.addcmul_(out.sum(0), top[:, None], value=2)
    elif out is not grad:
        grad += out.sum(0)


# -----------------------------------------------------------------------------
# the budget

def _count(kernel, tile, half=False, **chosen):
    """
    Compile a kernel for sm_90; chosen are its other constants, KIND and so on. Returns the instructions of its inner
    loop per element, its registers, and how many of its instructions spill.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    *_, rows, columns = [x.name for x in kernel.params if x.is_constexpr]
    constants = {**chosen, rows: tile[0], columns: tile[1]}
    operands, tensors = ("hT", "wT", "a", "b", "c", "minus"), ("s", "known", "top", "out", "scale")
    types, attrs = {}, {}
    for k, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in ("p", "eps", "floor"):
            types[name] = "fp32"
        elif name in operands:
            types[name] = "*fp16" if half else "*fp32"
        else:
            types[name] = "*fp32" if name in tensors else "i32"
        if types[name][0] in "*i" and name != "rows": # addresses and sizes of a language model are multiples of 16
            attrs[k,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, attrs)
    options = dict(num_warps=4, enable_fp_fusion=True)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code, labels, loops = [], {}, []
    for line in compiled.asm["sass"].splitlines():
        if line.startswith("LBB"):
            labels[line.rstrip(":")] = len(code)
        elif "\t" in line:
            code.append(line.split("\t")[1])
            back = re.search(r"BRA.* (LBB\d+);", code[-1])
            if back and back[1] in labels:
                loops.append(len(code) - labels[back[1]])
    text = "".join(code)
    registers = max(int(n) for n in re.findall(r"\bR(\d+)\b", text)) + 1
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    elements = tile[0] * tile[1] / 128 # of a thread
    if kernel in (_forward_half, _backward_l1):
        elements *= STEPS.value
    return max(loops) / elements, registers, spills


def budget():
    """
    Return rows (distance, pass, instructions per element, registers, spills). The backward pass is one kernel for dh
    and for dw.
    """
    forward_tile, backward_tile = _tiles("l1")
    rows = [("l1", "forward", *_count(_forward, forward_tile, KIND="l1", FLOOR=False)),
            ("l1", "backward", *_count(_backward_l1, backward_tile, AT_0=False)),
            ("l1 half", "forward", *_count(_forward_half, forward_tile, half=True)),
            ("l1 half", "backward", *_count(_backward_l1, backward_tile, half=True, AT_0=False))]
    for name in ("linf", "ties", "l1.5", "l3", "lp", "canberra", "canberra with floor"):
        KIND, FLOOR = name.removesuffix(" with floor"), name.endswith(" with floor")
        forward_tile, backward_tile = _tiles(KIND)
        rows.append((name, "forward", *_count(_forward, forward_tile, KIND=KIND, FLOOR=FLOOR)))
        if KIND != "ties": # linf's backward pass counts ties once, by a forward pass
            rows.append((name, "backward", *_count(_backward, backward_tile, KIND=KIND, FLOOR=FLOOR)))
    return rows


if __name__ == "__main__":
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = budget()
    except Exception as e: # another Triton, or one without its disassembler
        first_line = str(e).partition("\n")[0]
        sys.exit(f"the kernels cannot be compiled for sm_90 here: {type(e).__name__}: {first_line}")
    print(f"{'distance':<20} {'pass':<10} {'instructions per element':>24} {'registers':>10} {'spills':>7}")
    for name, step, instructions, registers, spills in rows:
        print(f"{name:<20} {step:<10} {instructions:>24.2f} {registers:>10} {spills:>7}")
