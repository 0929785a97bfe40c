"""The upcast of packed int8 weights inside a kernel; knows nothing of the products that use it."""

# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit
def load_weight(pointers, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A weight tile [ROWS, COLUMNS] in bf16, from bf16, or from int8 read as int16 pairs.

    `pointers` is [ROWS, COLUMNS] of bf16 or [ROWS, COLUMNS // 2] of int16. Pairs, because a
    thread's part of wgmma's first operand is pairs of columns: single bytes would each be moved
    and packed again (136 instructions for 32 weights against 80).
    """
    if QUANTIZED:
        # As bf16, 0x4300 plus 7 bits is 128 plus their value, and 0x4380 is 256. So clear the sign
        # bit, take away what 0x43 and the sign bit read as, and the signed value is left.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, u, v;
            cvt.u32.u16 t, $2;
            prmt.b32 t, t, 0x43434343, 0x4140;
            and.b32 u, t, 0xff7fff7f;
            and.b32 v, t, 0xff80ff80;
            sub.bf16x2 t, u, v;
            mov.b32 {$0, $1}, t;
            }""",
            "=h,=h,h",
            [tl.load(pointers)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=1,
        )
        return tl.join(low, high).reshape(ROWS, COLUMNS)
    else:  # noqa: RET505 - Triton compiles only one of the two
        return tl.load(pointers)


@triton.jit
def settle(total):
    """The same accumulator, after the products that feed it; no instruction of its own.

    Without it Triton 3.6 lets the last products of a step run on into the next while it loads the
    next weights into the registers they still read: wrong in 1 of 100 values at some tile sizes.
    """
    return tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)
