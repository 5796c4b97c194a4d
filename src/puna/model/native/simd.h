// Sixteen lanes, whatever the processor: what the kernels are written in.
//
// Every product-and-sum is an explicit fused multiply-add in a stated order, so one source gives one sequence of
// roundings in each lane, for any number of rows beside it.
#pragma once
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define INLINE static inline __attribute__((always_inline))

#if AVX512
typedef __m512 v16f;
typedef __m512i v16i;  // sixteen int32, or sixty-four bytes
INLINE v16f vzero(void) { return _mm512_setzero_ps(); }
INLINE v16f vset(float x) { return _mm512_set1_ps(x); }
INLINE v16f vload(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vstore(float *p, v16f x) { _mm512_storeu_ps(p, x); }
INLINE v16f vadd(v16f a, v16f b) { return _mm512_add_ps(a, b); }
INLINE v16f vsub(v16f a, v16f b) { return _mm512_sub_ps(a, b); }
INLINE v16f vmul(v16f a, v16f b) { return _mm512_mul_ps(a, b); }
INLINE v16f vdiv(v16f a, v16f b) { return _mm512_div_ps(a, b); }
INLINE v16f vmax(v16f a, v16f b) { return _mm512_max_ps(a, b); }
INLINE v16f vmin(v16f a, v16f b) { return _mm512_min_ps(a, b); }
INLINE v16f vabs(v16f a) { return _mm512_abs_ps(a); }
INLINE v16f vround(v16f a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE v16f vsqrt(v16f a) { return _mm512_sqrt_ps(a); }
INLINE v16f vfma(v16f a, v16f b, v16f c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
INLINE v16i iset(int x) { return _mm512_set1_epi32(x); }
INLINE v16i iload(const void *p) { return _mm512_loadu_si512(p); }
INLINE v16i iadd(v16i a, v16i b) { return _mm512_add_epi32(a, b); }
INLINE v16i low_nibbles(v16i x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
INLINE v16i high_nibbles(v16i x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
INLINE v16i ileft(v16i x, int bits) { return _mm512_slli_epi32(x, bits); }
INLINE v16i iright(v16i x, int bits) { return _mm512_srli_epi32(x, bits); }
// bits 4 and 5 of each byte of `y` beside what `x` has
INLINE v16i with_bits45(v16i x, v16i y) { return _mm512_or_si512(x, _mm512_and_si512(y, _mm512_set1_epi8(0x30))); }
INLINE int isum(v16i x) { return _mm512_reduce_add_epi32(x); }
INLINE v16f to_float(v16i x) { return _mm512_cvtepi32_ps(x); }
INLINE v16i to_int(v16f x) { return _mm512_cvtps_epi32(x); }  // nearest, ties to even
INLINE v16f exponent2(v16i n) {  // 2^n for normal results
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}
// sum over four bytes: lane += u[0] * s[0] + ... + u[3] * s[3], u unsigned, s signed; exact
INLINE v16i dot4(v16i sum, v16i u, v16i s) {  // not the intrinsic: gcc 12 moves each sum to another register and back
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
    return sum;
}
// lane += a[0] * b[0] + a[1] * b[1] of bfloat16 pairs
INLINE v16f dot2(v16f sum, v16i a, v16i b) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
}
INLINE v16f load_bf16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
// float32 as its upper half, rounded to the nearest (halves away from zero), and what the rounding took
INLINE v16f join_halves(const uint16_t *upper, const int16_t *lower) {
    v16i low = _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i *)lower));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(load_bf16(upper)), low));
}
INLINE void split_halves(v16f x, uint16_t *upper, int16_t *lower) {
    v16i bits = _mm512_castps_si512(x), up = _mm512_srli_epi32(_mm512_add_epi32(bits, iset(0x8000)), 16);
    _mm256_storeu_si256((__m256i *)upper, _mm512_cvtepi32_epi16(up));
    _mm256_storeu_si256((__m256i *)lower, _mm512_cvtepi32_epi16(bits));
}
INLINE v16f load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE v16f load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE v16f load_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
INLINE void store_i8(int8_t *p, v16i x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x)); }
INLINE v16i bits_from(v16i x, int shift, int mask) { return _mm512_and_si512(_mm512_srl_epi32(x, _mm_cvtsi32_si128(shift)), iset(mask)); }
// nearest, ties to even (a NaN stays one)
INLINE void store_bf16(uint16_t *p, v16f x) {
    v16i bits = _mm512_castps_si512(x);
    v16i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), iset(1));
    v16i up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), iset(0x7fff)), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    up = _mm512_mask_mov_epi32(up, nan, iset(0x7fc0));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(up));
}
#else
typedef struct { __m256 l, h; } v16f;
typedef struct { __m256i l, h; } v16i;
#define BOTH1(f, a) (v16f){f((a).l), f((a).h)}
#define BOTH2(f, a, b) (v16f){f((a).l, (b).l), f((a).h, (b).h)}
INLINE v16f vzero(void) { return (v16f){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE v16f vset(float x) { return (v16f){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE v16f vload(const float *p) { return (v16f){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void vstore(float *p, v16f x) { _mm256_storeu_ps(p, x.l), _mm256_storeu_ps(p + 8, x.h); }
INLINE v16f vadd(v16f a, v16f b) { return BOTH2(_mm256_add_ps, a, b); }
INLINE v16f vsub(v16f a, v16f b) { return BOTH2(_mm256_sub_ps, a, b); }
INLINE v16f vmul(v16f a, v16f b) { return BOTH2(_mm256_mul_ps, a, b); }
INLINE v16f vdiv(v16f a, v16f b) { return BOTH2(_mm256_div_ps, a, b); }
INLINE v16f vmax(v16f a, v16f b) { return BOTH2(_mm256_max_ps, a, b); }
INLINE v16f vmin(v16f a, v16f b) { return BOTH2(_mm256_min_ps, a, b); }
INLINE __m256 abs8(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE v16f vabs(v16f a) { return BOTH1(abs8, a); }
INLINE v16f vsqrt(v16f a) { return BOTH1(_mm256_sqrt_ps, a); }
INLINE __m256 round8(__m256 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE v16f vround(v16f a) { return BOTH1(round8, a); }
INLINE v16f vfma(v16f a, v16f b, v16f c) {
    return (v16f){_mm256_fmadd_ps(a.l, b.l, c.l), _mm256_fmadd_ps(a.h, b.h, c.h)};
}
INLINE v16i iset(int x) { return (v16i){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE v16i iload(const void *p) {
    return (v16i){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
INLINE v16i iadd(v16i a, v16i b) { return (v16i){_mm256_add_epi32(a.l, b.l), _mm256_add_epi32(a.h, b.h)}; }
INLINE __m256i nib8(__m256i x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
INLINE v16i low_nibbles(v16i x) { return (v16i){nib8(x.l), nib8(x.h)}; }
INLINE v16i high_nibbles(v16i x) { return (v16i){nib8(_mm256_srli_epi16(x.l, 4)), nib8(_mm256_srli_epi16(x.h, 4))}; }
INLINE v16i ileft(v16i x, int bits) { return (v16i){_mm256_slli_epi32(x.l, bits), _mm256_slli_epi32(x.h, bits)}; }
INLINE v16i iright(v16i x, int bits) { return (v16i){_mm256_srli_epi32(x.l, bits), _mm256_srli_epi32(x.h, bits)}; }
INLINE __m256i bits45_8(__m256i x, __m256i y) { return _mm256_or_si256(x, _mm256_and_si256(y, _mm256_set1_epi8(0x30))); }
INLINE v16i with_bits45(v16i x, v16i y) { return (v16i){bits45_8(x.l, y.l), bits45_8(x.h, y.h)}; }
INLINE int isum(v16i x) {
    int32_t lanes[8], sum = 0;
    _mm256_storeu_si256((__m256i *)lanes, _mm256_add_epi32(x.l, x.h));
    for (int i = 0; i < 8; i++) sum += lanes[i];
    return sum;
}
INLINE v16f to_float(v16i x) { return (v16f){_mm256_cvtepi32_ps(x.l), _mm256_cvtepi32_ps(x.h)}; }
INLINE v16i to_int(v16f x) { return (v16i){_mm256_cvtps_epi32(x.l), _mm256_cvtps_epi32(x.h)}; }
INLINE __m256 exp2_8(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
INLINE v16f exponent2(v16i n) { return (v16f){exp2_8(n.l), exp2_8(n.h)}; }
INLINE __m256i dot4_8(__m256i sum, __m256i u, __m256i s) {  // widened to 16 bits first: maddubs would saturate
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i even = _mm256_mullo_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    __m256i odd = _mm256_mullo_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));  // each within 255 * 128
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, ones), _mm256_madd_epi16(odd, ones)));
}
INLINE v16i dot4(v16i sum, v16i u, v16i s) { return (v16i){dot4_8(sum.l, u.l, s.l), dot4_8(sum.h, u.h, s.h)}; }
INLINE __m256 dot2_8(__m256 sum, __m256i a, __m256i b) {
    const __m256i high = _mm256_set1_epi32(0xffff0000);
    __m256 a1 = _mm256_castsi256_ps(_mm256_and_si256(a, high)), b1 = _mm256_castsi256_ps(_mm256_and_si256(b, high));
    __m256 a0 = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), b0 = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    return _mm256_fmadd_ps(a0, b0, _mm256_fmadd_ps(a1, b1, sum));
}
INLINE v16f dot2(v16f sum, v16i a, v16i b) { return (v16f){dot2_8(sum.l, a.l, b.l), dot2_8(sum.h, a.h, b.h)}; }
INLINE __m256 bf16_8(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE v16f load_bf16(const uint16_t *p) { return (v16f){bf16_8(p), bf16_8(p + 8)}; }
INLINE v16f join_halves(const uint16_t *upper, const int16_t *lower) {
    uint32_t bits[16];
    for (int i = 0; i < 16; i++) bits[i] = ((uint32_t)upper[i] << 16) + (uint32_t)(int32_t)lower[i];
    return vload((const float *)bits);
}
INLINE void split_halves(v16f x, uint16_t *upper, int16_t *lower) {
    uint32_t bits[16];
    vstore((float *)bits, x);
    for (int i = 0; i < 16; i++) upper[i] = (uint16_t)((bits[i] + 0x8000) >> 16), lower[i] = (int16_t)bits[i];
}
INLINE v16f load_f16(const uint16_t *p) {
    return (v16f){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE __m256 i8_8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
INLINE v16f load_i8(const int8_t *p) { return (v16f){i8_8(p), i8_8(p + 8)}; }
INLINE __m256 u8_8(const uint8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
INLINE v16f load_u8(const uint8_t *p) { return (v16f){u8_8(p), u8_8(p + 8)}; }
INLINE __m256i bits8(__m256i x, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi32(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(mask));
}
INLINE v16i bits_from(v16i x, int shift, int mask) { return (v16i){bits8(x.l, shift, mask), bits8(x.h, shift, mask)}; }
INLINE void store_i8(int8_t *p, v16i x) {
    int32_t lanes[16];
    _mm256_storeu_si256((__m256i *)lanes, x.l), _mm256_storeu_si256((__m256i *)(lanes + 8), x.h);
    for (int i = 0; i < 16; i++) p[i] = (int8_t)lanes[i];
}
INLINE void store_bf16(uint16_t *p, v16f x) {
    float lanes[16];
    vstore(lanes, x);
    for (int i = 0; i < 16; i++) {
        uint32_t bits;
        memcpy(&bits, lanes + i, 4);
        p[i] = lanes[i] != lanes[i] ? 0x7fc0 : (uint16_t)((bits + ((bits >> 16) & 1) + 0x7fff) >> 16);
    }
}
#endif

INLINE void prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

INLINE void prefetch_far(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T1); }  // into the second cache

INLINE void prefetch_once(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_NTA); }  // will not be wanted again

INLINE v16i ibroadcast(const void *p) {  // four bytes in every lane
    int32_t x;
    memcpy(&x, p, 4);
    return iset(x);
}

// Sum of the sixteen lanes, pairwise, always in the same order.
INLINE float vsum(v16f x) {
    float lanes[16];
    vstore(lanes, x);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}
INLINE float vmaximum(v16f x) {
#if AVX512
    return _mm512_reduce_max_ps(x);
#else
    __m256 a = _mm256_max_ps(x.l, x.h);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
#endif
}

// e^x within 2 units in the last place: x = n ln 2 + r, a polynomial of degree 6 in r (coefficients of Cephes' expf).
// Below -87 the result is 0, above 88 it is e^88.
INLINE v16f vexp(v16f x) {
    v16f low = vset(-87.0f), bounded = vmin(vmax(x, low), vset(88.0f));
    v16f n = vround(vmul(bounded, vset(1.44269504088896341f)));
    v16f r = vfma(n, vset(-0.693359375f), bounded);
    r = vfma(n, vset(2.12194440e-4f), r);
    v16f p = vset(1.9875691500e-4f);
    p = vfma(p, r, vset(1.3981999507e-3f));
    p = vfma(p, r, vset(8.3334519073e-3f));
    p = vfma(p, r, vset(4.1665795894e-2f));
    p = vfma(p, r, vset(1.6666665459e-1f));
    p = vfma(p, r, vset(5.0000001201e-1f));
    p = vfma(p, vmul(r, r), vadd(r, vset(1.0f)));
    p = vmul(p, exponent2(to_int(n)));
#if AVX512
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_GE_OQ), p);
#else
    return (v16f){_mm256_and_ps(p.l, _mm256_cmp_ps(x.l, low.l, _CMP_GE_OQ)),
                  _mm256_and_ps(p.h, _mm256_cmp_ps(x.h, low.h, _CMP_GE_OQ))};
#endif
}

// Values of the stream, float32 or bfloat16, in sixteens from element i.
INLINE v16f load_any(const void *p, long i, int bf16) {
    return bf16 ? load_bf16((const uint16_t *)p + i) : vload((const float *)p + i);
}
INLINE void store_any(void *p, long i, v16f x, int bf16) {
    if (bf16) store_bf16((uint16_t *)p + i, x);
    else vstore((float *)p + i, x);
}
INLINE v16f rounded(v16f x, int bf16) {  // to the stream's precision and back
    if (!bf16) return x;
    uint16_t half[16];
    store_bf16(half, x);
    return load_bf16(half);
}
// The last few elements of a row go through a padded copy, so that they see the very same instructions.
INLINE v16f load_tail(const void *p, long i, long end, int bf16) {
    char padded[64] = {0};
    int size = bf16 ? 2 : 4;
    memcpy(padded, (const char *)p + i * size, (end - i) * size);
    return load_any(padded, 0, bf16);
}
INLINE void store_tail(void *p, long i, long end, v16f x, int bf16) {
    char padded[64];
    int size = bf16 ? 2 : 4;
    store_any(padded, 0, x, bf16);
    memcpy((char *)p + i * size, padded, (end - i) * size);
}
