/* Random bits, exp and log, with the bits of `bits` and `exact`.
 *
 * The formulas of exp and log are those of `exact`, operation by operation: this is compiled without fusing a product
 * into a sum, and without -ffast-math.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* One function for every width of registers; the loader takes the widest that the processor has. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define WIDE __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDE
#endif

#define GAMMA 0x9E3779B97F4A7C15u
#define SIGN ((uint64_t)1 << 63)
#define MASK_52 (((uint64_t)1 << 52) - 1)
/* From 2^52 on a double is an integer: adding it rounds, ties to even, and leaves the integer in the lower bits. */
#define ROUNDER 0x1p52
#define ROUNDER_BITS ((uint64_t)0x433 << 52)

static inline double as_double(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t as_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static uint64_t philox_start(uint64_t seed, uint64_t stream, uint64_t step) {
    uint32_t c[4] = {0, (uint32_t)stream, (uint32_t)step, (uint32_t)(step >> 32)};
    uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)c[0] * 0xD2511F53u, second = (uint64_t)c[2] * 0xCD9E8D57u;
        uint32_t c0 = (uint32_t)(second >> 32) ^ c[1] ^ k[0], c2 = (uint32_t)(first >> 32) ^ c[3] ^ k[1];
        c[1] = (uint32_t)second, c[3] = (uint32_t)first, c[0] = c0, c[2] = c2;
        k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
    }
    return (uint64_t)c[1] << 32 | c[0];
}

static inline uint64_t random_bits(uint64_t start, uint64_t sample) {
    uint64_t word = start + (sample + 1) * GAMMA;
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9u;
    word = (word ^ word >> 27) * 0x94D049BB133111EBu;
    return word ^ word >> 31;
}

static inline int64_t below(uint64_t bits, int64_t limit) { return (int64_t)((unsigned __int128)bits * (uint64_t)limit >> 64); }

/* The upper 53 bits read as a signed number, in (0, 1]. */
static inline double unit_interval(uint64_t bits) {
    return (double)(int64_t)(((bits ^ SIGN) >> 11) + 1) * 0x1p-53;
}

static inline double rounded_down(double x) { /* x from 0 to 2^51 */
    double near = (x + ROUNDER) - ROUNDER;
    return near > x ? near - 1.0 : near;
}

static inline double exp_of_negative(double t) {
    double k = rounded_down(t * 1.4426950408889634 + 0.5);
    double r = (t - k * 0x1.62e42feep-1) - k * 1.9082149292705877e-10;
    double result = -1.0 / 6227020800.0;
    result = result * r + 1.0 / 479001600.0;
    result = result * r + -1.0 / 39916800.0;
    result = result * r + 1.0 / 3628800.0;
    result = result * r + -1.0 / 362880.0;
    result = result * r + 1.0 / 40320.0;
    result = result * r + -1.0 / 5040.0;
    result = result * r + 1.0 / 720.0;
    result = result * r + -1.0 / 120.0;
    result = result * r + 1.0 / 24.0;
    result = result * r + -1.0 / 6.0;
    result = result * r + 1.0 / 2.0;
    result = result * r + -1.0;
    result = result * r + 1.0;
    /* k of a NaN is not an integer, but its product is NaN for any power of two. */
    return result * as_double((1023 - (as_bits(k + ROUNDER) & 0x7FF)) << 52);
}

static inline double log_of_unit(double u) {
    uint64_t bits = as_bits(u);
    double mantissa = as_double((bits & MASK_52) | (uint64_t)1023 << 52);
    int is_high = mantissa > 1.4142135623730951;
    double f = (is_high ? mantissa * 0.5 : mantissa) - 1.0;
    double e = (double)((int64_t)(bits >> 52) - 1023 + is_high);
    double s = f / (f + 2.0), z = s * s;
    double series = 2.0 / 23.0;
    for (int n = 21; n > 0; n -= 2) series = series * z + 2.0 / n;
    return e * 0x1.62e42feep-1 + (s * series + e * 1.9082149292705877e-10);
}
