"""ReLU linear attention (`reference.definition`) in Triton: two passes over the tokens, forward and backward.

Forward:  state  k, v -> S, z              apply        q -> out
Backward: query  q, dout -> dq, dS, dz     key_value    k, v -> dk, dv
A program handles one image, one head (or a few adjacent heads) and a run of tokens. Sums over tokens are written as one
partial per run and added in a fixed order by the reader, without atomics, so results are bitwise reproducible.
With few tokens, one program computes both passes of a head in a single launch. Only q, k, v and the state are
saved for the backward, which recomputes the rest and reads each tensor of N tokens once. With r = relu(q),
a = 1 / (r z + eps), t = dout S^T and g = a (r . t) = dout . out:
    dq = a (t - g z) where q > 0     dS = sum (a r)^T dout     dz = -sum a g r
    dk = v dS^T + dz where k > 0     dv = relu(k) dS
q and k are normalised on load: q times its weight (its root mean square cancels), k times 1 / root mean square (rstd)
times its weight. With u = k rstd, e = weight dk and the mean over all heads of a token,
    dk = rstd (e - u mean(u e))      which needs one more pass over k and v.

Every accumulator is float32. k^T v multiplies in the input dtype. S, dS and a r are float32; products with them are
float32 for float32 inputs ("ieee"), accurate to about 2^-21 for float16 ("tf32x3") and to 2^-10 for bfloat16 ("tf32"),
whose results are rounded to 2^-9.

Letters: N tokens, D head width, GROUP heads in a program, W their columns rounded up to a power of two (16 or more),
T tokens in a tile, LOOPS tiles in a run, PARTS the number of runs rounded up to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def _place(
    H: int, RUN: tl.constexpr, D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's image and first token (int64, like all offsets); for each column its head, its index d in the
    head, and whether it is in use."""
    groups = tl.cdiv(H, GROUP)
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, W)
    if GROUP == 1:
        head = program % groups + tl.zeros((W,), tl.int64)
        d = column
        real = column < D
    else:
        head = program % groups * GROUP + column // D
        d = column % D
        real = (column < GROUP * D) & (head < H)
    return program // groups, tl.program_id(1).to(tl.int64) * RUN, head, d.to(tl.int64), real


@triton.jit
def _rows(base: tl.tensor, strides: tl.tuple, b: int, n: tl.tensor, head: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Pointers (T, W) to tokens n, in a (B, N, H, D) tensor of any strides."""
    return base + b * strides[0] + n[:, None] * strides[1] + (head * strides[2] + d * strides[3])[None, :]


@triton.jit
def _load(rows: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(rows, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(rows: tl.tensor, tile: tl.tensor, inside: tl.tensor) -> None:
    tl.store(rows, tile.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _relu(x: tl.tensor) -> tl.tensor:
    """max(x, 0) that propagates NaN, as torch does."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def _counted(keep: tl.tensor, b: int, n: tl.tensor, N: int, MASKED: tl.constexpr) -> tl.tensor:
    """(T,) True at keys within N that the mask (B, N) keeps."""
    inside = n < N
    if MASKED:
        inside = inside & (tl.load(keep + b * N + n, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _weight(
    norm: tl.tensor, head: tl.tensor, d: tl.tensor, real: tl.tensor, D: tl.constexpr, NORMED: tl.constexpr
) -> tl.tensor:
    """(W,) of a norm's weight (H * D,); unused without a norm."""
    return _load(norm + head * D + d, real) if NORMED else tl.zeros_like(d)


@triton.jit
def _per_head(x: tl.tensor, T: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr) -> tl.tensor:
    """Sums over each head's columns of (T, W), broadcastable to (T, W): (T, 1) or (T, W)."""
    if GROUP == 1:
        sums = tl.sum(x, 1)[:, None]
    else:
        sums = tl.sum(tl.reshape(x, (T, GROUP, W // GROUP)), 2)[:, :, None]
        sums = tl.reshape(tl.broadcast_to(sums, (T, GROUP, W // GROUP)), (T, W))
    return sums


@triton.jit
def _state_at(
    state: tl.tensor, image: int, head: tl.tensor, d: tl.tensor, real: tl.tensor, H: int, D: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Pointers to S (W, W) and z (W,) in (images, H, D + 1, D), whose last row is z; the mask of S within a head."""
    base = state + (image * H + head) * (D + 1) * D
    own = real[:, None] & real[None, :] & (head[:, None] == head[None, :])
    return (base + d * D)[:, None] + d[None, :], base + D * D + d, own


@triton.jit
def _store_state(
    state: tl.tensor, image: int, s: tl.tensor, z: tl.tensor, head: tl.tensor, d: tl.tensor, real: tl.tensor, H: int,
    D: tl.constexpr,
) -> None:  # fmt: skip
    to_s, to_z, own = _state_at(state, image, head, d, real, H, D)
    tl.store(to_s, s, mask=own)
    tl.store(to_z, z, mask=real)


@triton.jit
def _part(b: int, H: int, GROUP: tl.constexpr) -> tl.tensor:
    """Index of this program's partial in (runs * B)."""
    return tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tl.cdiv(H, GROUP)) + b


@triton.jit
def _add_states(
    state: tl.tensor, b: int, head: tl.tensor, d: tl.tensor, real: tl.tensor, H: int, D: tl.constexpr,
    W: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """S (W, W), zero between heads, and z (W,): the partials of all runs, summed in order."""
    batch = tl.num_programs(0) // tl.cdiv(H, GROUP)
    s = tl.zeros((W, W), tl.float32)
    z = tl.zeros((W,), tl.float32)
    for i in tl.static_range(PARTS):
        to_s, to_z, own = _state_at(state, b + i * batch.to(tl.int64), head, d, real, H, D)
        valid = real
        if PARTS > 1:
            valid = real & (i < tl.num_programs(1))
            own = own & (i < tl.num_programs(1))
        s += tl.load(to_s, mask=own, other=0.0)
        z += tl.load(to_z, mask=valid, other=0.0)
    return s, z


@triton.jit
def _sum_keys(
    k: tl.tensor, v: tl.tensor, keep: tl.tensor, weight: tl.tensor, rstd: tl.tensor, k_strides: tl.tuple,
    v_strides: tl.tuple, b: int, first: int, head: tl.tensor, d: tl.tensor, real: tl.tensor, N: int, W: tl.constexpr,
    T: tl.constexpr, LOOPS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr,
    PRODUCT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """S (W, W), with unused products between heads, and z (W,) of one run."""
    s = tl.zeros((W, W), tl.float32)
    z = tl.zeros((T, W), tl.float32)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        counted = _counted(keep, b, n, N, MASKED)
        inside = counted[:, None] & real[None, :]
        key = _load(_rows(k, k_strides, b, n, head, d), inside)
        if NORMED:
            key *= tl.load(rstd + b * N + n, mask=counted, other=0.0)[:, None] * weight[None, :]
        key = _relu(key)
        value = _load(_rows(v, v_strides, b, n, head, d), inside)
        s = tl.dot(tl.trans(key).to(PRODUCT), value.to(PRODUCT), s, input_precision=PRECISION)
        z += key
    return s, tl.sum(z, 0)


@triton.jit
def _attend(
    q: tl.tensor, out: tl.tensor, weight: tl.tensor, s: tl.tensor, z: tl.tensor, q_strides: tl.tuple,
    out_strides: tl.tuple, b: int, first: int, head: tl.tensor, d: tl.tensor, real: tl.tensor, N: int, eps: float,
    W: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    NORMED: tl.constexpr,
) -> None:  # fmt: skip
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        inside = (n < N)[:, None] & real[None, :]
        query = _load(_rows(q, q_strides, b, n, head, d), inside)
        if NORMED:
            query *= weight[None, :]
        query = _relu(query)
        normaliser = _per_head(query * z[None, :], T, W, GROUP) + eps
        tile = tl.dot(query, s, input_precision=PRECISION) / normaliser
        _store(_rows(out, out_strides, b, n, head, d), tile, inside)


@triton.jit
def _sum_queries(
    q: tl.tensor, dout: tl.tensor, dq: tl.tensor, weight: tl.tensor, s: tl.tensor, z: tl.tensor, q_strides: tl.tuple,
    dout_strides: tl.tuple, dq_strides: tl.tuple, b: int, first: int, head: tl.tensor, d: tl.tensor, real: tl.tensor,
    N: int, eps: float, W: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, NORMED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Write dq; return dS (W, W), with unused products between heads, dz (W,) and the norm weight's gradient (W,)."""
    ds = tl.zeros((W, W), tl.float32)
    dz = tl.zeros((T, W), tl.float32)
    dweight = tl.zeros((T, W), tl.float32)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        inside = (n < N)[:, None] & real[None, :]
        x = _load(_rows(q, q_strides, b, n, head, d), inside)
        query = _relu(x * weight[None, :] if NORMED else x)
        grad = _load(_rows(dout, dout_strides, b, n, head, d), inside)
        a = 1.0 / (_per_head(query * z[None, :], T, W, GROUP) + eps)
        t = tl.dot(grad, tl.trans(s), input_precision=PRECISION)
        scaled = query * a
        g = _per_head(scaled * t, T, W, GROUP)
        tile = tl.where(query == 0, 0.0, a * (t - g * z[None, :]))
        if NORMED:
            dweight += x * tile
            tile *= weight[None, :]
        _store(_rows(dq, dq_strides, b, n, head, d), tile, inside)
        ds = tl.dot(tl.trans(scaled), grad, ds, input_precision=PRECISION)
        dz -= scaled * g
    return ds, tl.sum(dz, 0), tl.sum(dweight, 0)


@triton.jit
def _to_keys(
    k: tl.tensor, v: tl.tensor, keep: tl.tensor, dk: tl.tensor, dv: tl.tensor, weight: tl.tensor, rstd: tl.tensor,
    means: tl.tensor, ds: tl.tensor, dz: tl.tensor, k_strides: tl.tuple, v_strides: tl.tuple, dk_strides: tl.tuple,
    dv_strides: tl.tuple, b: int, first: int, head: tl.tensor, d: tl.tensor, real: tl.tensor, N: int,
    W: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
    NORMED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Write dk and dv; return the norm weight's gradient (W,)."""
    dweight = tl.zeros((T, W), tl.float32)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        inside = (n < N)[:, None] & real[None, :]
        counted = _counted(keep, b, n, N, MASKED)
        x = _load(_rows(k, k_strides, b, n, head, d), counted[:, None] & real[None, :])
        value = _load(_rows(v, v_strides, b, n, head, d), counted[:, None] & real[None, :])
        if NORMED:
            scale = tl.load(rstd + b * N + n, mask=counted, other=0.0)[:, None]
            x *= scale
            key = _relu(x * weight[None, :])
        else:
            key = _relu(x)
        tile = tl.where(key == 0, 0.0, tl.dot(value, tl.trans(ds), input_precision=PRECISION) + dz[None, :])
        if NORMED:
            dweight += x * tile
            mean = tl.load(means + b * N + n, mask=counted, other=0.0)[:, None]
            tile = scale * (tile * weight[None, :] - x * mean)
        _store(_rows(dk, dk_strides, b, n, head, d), tile, inside)
        _store(_rows(dv, dv_strides, b, n, head, d), tl.dot(key, ds, input_precision=PRECISION), inside)
    return tl.sum(dweight, 0)


@triton.jit
def _store_weight(
    dnorm: tl.tensor, dweight: tl.tensor, b: int, head: tl.tensor, d: tl.tensor, real: tl.tensor, H: int,
    D: tl.constexpr, GROUP: tl.constexpr, NORMED: tl.constexpr,
) -> None:  # fmt: skip
    """Store this program's partial gradient of a norm weight into (runs * B, H * D)."""
    if NORMED:
        tl.store(dnorm + (_part(b, H, GROUP) * H + head) * D + d, dweight, mask=real)


@triton.jit
def inverse_rms_kernel(
    k: tl.tensor, rstd: tl.tensor, k_strides: tl.tuple, N: int, eps: float,
    D: tl.constexpr, C: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
) -> None:  # fmt: skip
    """1 / root mean square over all C = H D columns, for T tokens per program, W columns at a time."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * T + tl.arange(0, T)
    total = tl.zeros((T, W), tl.float32)
    for i in range((C + W - 1) // W):
        column = i * W + tl.arange(0, W)
        inside = (n < N)[:, None] & (column < C)[None, :]
        x = _load(_rows(k, k_strides, b, n, (column // D).to(tl.int64), (column % D).to(tl.int64)), inside)
        total += x * x
    tl.store(rstd + b * N + n, tl.rsqrt(tl.sum(total, 1) / C + eps), mask=n < N)


@triton.jit
def state_kernel(
    k: tl.tensor, v: tl.tensor, keep: tl.tensor, norm: tl.tensor, rstd: tl.tensor, state: tl.tensor,
    k_strides: tl.tuple, v_strides: tl.tuple, N: int, H: int,
    D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, PRODUCT: tl.constexpr,
) -> None:  # fmt: skip
    b, first, head, d, real = _place(H, LOOPS * T, D, W, GROUP)
    weight = _weight(norm, head, d, real, D, NORMED)
    s, z = _sum_keys(
        k, v, keep, weight, rstd, k_strides, v_strides, b, first, head, d, real, N,
        W, T, LOOPS, PRECISION, MASKED, NORMED, PRODUCT,
    )  # fmt: skip
    _store_state(state, _part(b, H, GROUP), s, z, head, d, real, H, D)


@triton.jit
def apply_kernel(
    q: tl.tensor, norm: tl.tensor, partials: tl.tensor, state: tl.tensor, out: tl.tensor, q_strides: tl.tuple,
    out_strides: tl.tuple, N: int, H: int, eps: float,
    D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr, NORMED: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    b, first, head, d, real = _place(H, LOOPS * T, D, W, GROUP)
    weight = _weight(norm, head, d, real, D, NORMED)
    s, z = _add_states(partials, b, head, d, real, H, D, W, GROUP, PARTS)
    if PARTS > 1 and tl.program_id(1) == 0:  # the final state is stored once, for the backward
        _store_state(state, b, s, z, head, d, real, H, D)
    _attend(
        q, out, weight, s, z, q_strides, out_strides, b, first, head, d, real, N, eps,
        W, T, LOOPS, GROUP, PRECISION, NORMED,
    )  # fmt: skip


@triton.jit
def forward_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, keep: tl.tensor, norm_q: tl.tensor, norm_k: tl.tensor, rstd: tl.tensor,
    state: tl.tensor, out: tl.tensor, q_strides: tl.tuple, k_strides: tl.tuple, v_strides: tl.tuple,
    out_strides: tl.tuple, N: int, H: int, eps: float,
    D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, PRODUCT: tl.constexpr,
) -> None:  # fmt: skip
    """Both forward passes of one head over all tokens."""
    b, first, head, d, real = _place(H, LOOPS * T, D, W, GROUP)
    s, z = _sum_keys(
        k, v, keep, _weight(norm_k, head, d, real, D, NORMED), rstd, k_strides, v_strides, b, first, head, d, real, N,
        W, T, LOOPS, PRECISION, MASKED, NORMED, PRODUCT,
    )  # fmt: skip
    _store_state(state, b, s, z, head, d, real, H, D)
    _attend(
        q, out, _weight(norm_q, head, d, real, D, NORMED), s, z, q_strides, out_strides, b, first, head, d, real, N,
        eps, W, T, LOOPS, GROUP, PRECISION, NORMED,
    )  # fmt: skip


@triton.jit
def query_kernel(
    q: tl.tensor, dout: tl.tensor, norm: tl.tensor, state: tl.tensor, dq: tl.tensor, dstate: tl.tensor,
    dnorm: tl.tensor, q_strides: tl.tuple, dout_strides: tl.tuple, dq_strides: tl.tuple, N: int, H: int, eps: float,
    D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr, NORMED: tl.constexpr,
) -> None:  # fmt: skip
    b, first, head, d, real = _place(H, LOOPS * T, D, W, GROUP)
    weight = _weight(norm, head, d, real, D, NORMED)
    s, z = _add_states(state, b, head, d, real, H, D, W, GROUP, 1)
    ds, dz, dweight = _sum_queries(
        q, dout, dq, weight, s, z, q_strides, dout_strides, dq_strides, b, first, head, d, real, N, eps,
        W, T, LOOPS, GROUP, PRECISION, NORMED,
    )  # fmt: skip
    _store_state(dstate, _part(b, H, GROUP), ds, dz, head, d, real, H, D)
    _store_weight(dnorm, dweight, b, head, d, real, H, D, GROUP, NORMED)


@triton.jit
def key_products_kernel(
    k: tl.tensor, v: tl.tensor, keep: tl.tensor, norm: tl.tensor, rstd: tl.tensor, dstate: tl.tensor,
    products: tl.tensor, k_strides: tl.tuple, v_strides: tl.tuple, N: int, H: int,
    D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """Sum of u e over each head's columns: (B, N, H)."""
    b, first, head, d, real = _place(H, LOOPS * T, D, W, GROUP)
    weight = _weight(norm, head, d, real, D, True)
    ds, dz = _add_states(dstate, b, head, d, real, H, D, W, GROUP, PARTS)
    for i in range(LOOPS):
        n = first + i * T + tl.arange(0, T)
        counted = _counted(keep, b, n, N, MASKED)
        inside = counted[:, None] & real[None, :]
        scale = tl.load(rstd + b * N + n, mask=counted, other=0.0)[:, None]
        key = _relu(_load(_rows(k, k_strides, b, n, head, d), inside) * scale * weight[None, :])
        value = _load(_rows(v, v_strides, b, n, head, d), inside)
        tile = key * (tl.dot(value, tl.trans(ds), input_precision=PRECISION) + dz[None, :])
        to = products + (b * N + n)[:, None] * H + head[None, :]
        tl.store(to, _per_head(tile, T, W, GROUP) + tl.zeros((T, W), tl.float32),
                 mask=(n < N)[:, None] & (real & (d == 0))[None, :])  # fmt: skip


@triton.jit
def key_value_kernel(
    k: tl.tensor, v: tl.tensor, keep: tl.tensor, norm: tl.tensor, rstd: tl.tensor, means: tl.tensor,
    dstate: tl.tensor, dk: tl.tensor, dv: tl.tensor, dnorm: tl.tensor, k_strides: tl.tuple, v_strides: tl.tuple,
    dk_strides: tl.tuple, dv_strides: tl.tuple, N: int, H: int,
    D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, NORMED: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    b, first, head, d, real = _place(H, LOOPS * T, D, W, GROUP)
    weight = _weight(norm, head, d, real, D, NORMED)
    ds, dz = _add_states(dstate, b, head, d, real, H, D, W, GROUP, PARTS)
    dweight = _to_keys(
        k, v, keep, dk, dv, weight, rstd, means, ds, dz, k_strides, v_strides, dk_strides, dv_strides, b, first, head,
        d, real, N, W, T, LOOPS, PRECISION, MASKED, NORMED,
    )  # fmt: skip
    _store_weight(dnorm, dweight, b, head, d, real, H, D, GROUP, NORMED)


@triton.jit
def backward_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, keep: tl.tensor, dout: tl.tensor, state: tl.tensor, dq: tl.tensor,
    dk: tl.tensor, dv: tl.tensor, q_strides: tl.tuple, k_strides: tl.tuple, v_strides: tl.tuple,
    dout_strides: tl.tuple, dq_strides: tl.tuple, dk_strides: tl.tuple, dv_strides: tl.tuple, N: int, H: int,
    eps: float,
    D: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, LOOPS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
) -> None:  # fmt: skip
    """Both backward passes of one head over all tokens; without norms, whose mean is over all heads."""
    b, first, head, d, real = _place(H, LOOPS * T, D, W, GROUP)
    s, z = _add_states(state, b, head, d, real, H, D, W, GROUP, 1)
    ds, dz, _ = _sum_queries(
        q, dout, dq, z, s, z, q_strides, dout_strides, dq_strides, b, first, head, d, real, N, eps,
        W, T, LOOPS, GROUP, PRECISION, False,
    )  # fmt: skip
    _to_keys(
        k, v, keep, dk, dv, z, z, z, ds, dz, k_strides, v_strides, dk_strides, dv_strides, b, first, head,
        d, real, N, W, T, LOOPS, PRECISION, MASKED, False,
    )  # fmt: skip
