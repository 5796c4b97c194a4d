// Processors with AVX-512, its integer dot products (VNNI) and bfloat16 products: Zen 4, Sapphire Rapids and later.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")
#define AVX512 1
#define NAME(function) function##_avx512
#include "simd.h"
#include "linear.c"
#include "rows.c"
#include "elementwise.c"
#include "quantize.c"
#include "words.c"
#include "attention.c"
#include "experts.c"
#include "layers.c"
#include "vision.c"
#include "training.c"
#include "causal.c"

int isa(void) {  // the best set that this processor and its operating system offer: 2 AVX-512, 1 AVX2, 0 neither
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl"))
        return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
