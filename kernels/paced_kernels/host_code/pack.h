/* Operands of a product, laid out for the units of a processor that multiply pairs of bfloat16.
 *
 * A pair is two elements that follow one another in depth, in 32 bits, the first of them below. Float32 is rounded to the
 * nearest bfloat16 on the way, times its scale.
 */

typedef struct {
    const char *at;
    int is_float;        /* float32, else bfloat16 */
    int64_t depth, side; /* strides in elements, along the summed dimension and the other; one of them is 1 */
    const float *scale;  /* of every place along the summed dimension, for float32; NULL is 1 */
} Operand;

static inline Operand moved(Operand operand, int64_t depth, int64_t side) {
    int64_t size = operand.is_float ? 4 : 2;
    operand.at += size * (depth * operand.depth + side * operand.side);
    if (operand.scale) operand.scale += depth;
    return operand;
}

/* 32 neighbours along the summed dimension as bfloat16; 0 where not in the mask. */
UNITS static inline __m512i thirty_two(Operand from, __mmask32 mask) {
    if (!from.is_float) return _mm512_maskz_loadu_epi16(mask, from.at);
    __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, from.at);
    __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from.at + 64);
    if (from.scale) {
        low = _mm512_mul_ps(low, _mm512_maskz_loadu_ps((__mmask16)mask, from.scale));
        high = _mm512_mul_ps(high, _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from.scale + 16));
    }
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

/* 16 neighbours along the other dimension as bfloat16, each in the lower half of 32 bits. */
UNITS static inline __m512i sixteen(Operand from, __mmask16 mask) {
    if (!from.is_float) return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from.at));
    __m512 values = _mm512_maskz_loadu_ps(mask, from.at);
    if (from.scale) values = _mm512_mul_ps(values, _mm512_set1_ps(*from.scale));
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
}

static inline uint32_t first_bits(int64_t count) { /* as many ones, 0 to 32 of them */
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0 : (1u << count) - 1;
}

/* Exchange rows and columns of 16 x 16 values of 32 bits. */
UNITS static inline void transpose(__m512i *row) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        row[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        row[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        row[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        row[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        row[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        row[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

/* Write pairs [depth / 2, width] of an operand [depth, side], side <= width; 0 past its ends. Width is a multiple of 16. */
UNITS static void pack_pairs(uint32_t *to, int64_t width, Operand from, int64_t depth, int64_t side) {
    int64_t pairs = (depth + 1) / 2;
    if (from.depth == 1) {
        for (int64_t first = 0; first < width; first += 16) {
            for (int64_t p = 0; p < pairs; p += 16) {
                __m512i row[16];
                __mmask32 mask = first_bits(depth - 2 * p);
                for (int i = 0; i < 16; i++) {
                    int is_inside = first + i < side;
                    row[i] = is_inside ? thirty_two(moved(from, 2 * p, first + i), mask) : _mm512_setzero_si512();
                }
                transpose(row);
                for (int i = 0; i < 16 && p + i < pairs; i++)
                    _mm512_storeu_si512(to + (p + i) * width + first, row[i]);
            }
        }
        return;
    }
    for (int64_t p = 0; p < pairs; p++) {
        int has_second = 2 * p + 1 < depth;
        for (int64_t first = 0; first < width; first += 16) {
            __mmask16 mask = (__mmask16)first_bits(side - first);
            __m512i low = sixteen(moved(from, 2 * p, first), mask);
            __m512i high = has_second ? sixteen(moved(from, 2 * p + 1, first), mask) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + p * width + first, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}
